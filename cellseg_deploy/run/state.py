"""State of a run: the content of its journal, kept up to date as lines are added."""

from __future__ import annotations

from dataclasses import dataclass, field

from cellseg_deploy.run.journal import Entry, JournalContent


@dataclass
class RunState:
    """``entries``: the last line of each image, by image name; the tables contain exactly these images.

    ``scales``: by group of images. ``files``: SHA-256 of every content written to each run-level file, by file name.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    files: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: JournalContent | None) -> RunState:
        """Return the state after ``content``, whose dictionaries it reuses; for None, that of a new run."""
        return cls() if content is None else cls(content.entries, content.scales, content.files)

    def done(self, image: str) -> Entry | None:
        """Return the line of ``image`` if it says that the image is done."""
        entry = self.entries.get(image)
        return entry if entry is not None and entry.record.status == "done" else None

    @property
    def in_order(self) -> list[Entry]:
        """Entries sorted by image name, the order of the tables."""
        return [self.entries[name] for name in sorted(self.entries)]

    @property
    def output_names(self) -> dict[str, str]:
        """Names of the images' files, without extension, by image; see ``names.output_names``."""
        return {name: entry.record.output_name for name, entry in self.entries.items() if entry.record.output_name}

    @property
    def image_files(self) -> set[str]:
        """Paths, relative to the output folder (posix), of all files that image lines vouch for."""
        return {file.path for entry in self.entries.values() for file in entry.record.outputs}
