"""What a run knows: what its journal says, kept up to date while lines are added."""

from __future__ import annotations

from dataclasses import dataclass, field

from cellseg_deploy.run.journal import Entry, JournalContent


@dataclass
class RunState:
    """``entries``: the last line of each image, by its name: the tables tell of these, and of nothing else.

    ``scales``: by group of images. ``files``: SHA-256 of all that was written to a file that tells of all images, by
    its name.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    files: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: JournalContent | None) -> RunState:
        """Return the state after the lines of ``content``, which it takes over; of a new run for None."""
        return cls() if content is None else cls(content.entries, content.scales, content.files)

    def add(self, entry: Entry) -> None:
        """Take note of a line that was added: what the image's earlier lines said no longer holds."""
        self.entries[entry.record.image] = entry

    def done(self, image: str) -> Entry | None:
        """Return the line of ``image`` if it says that the image is done."""
        entry = self.entries.get(image)
        return entry if entry is not None and entry.record.status == "done" else None

    @property
    def in_order(self) -> list[Entry]:
        """Entries in the order of the images' names, in which tables tell of them."""
        return [self.entries[name] for name in sorted(self.entries)]

    @property
    def output_names(self) -> dict[str, str]:
        """What files of the images are called, without endings, by image; see ``names.output_names``."""
        return {name: entry.record.output_name for name, entry in self.entries.items() if entry.record.output_name}

    @property
    def image_files(self) -> set[str]:
        """Paths, relative to the output folder (posix), of all files that the lines of images vouch for."""
        return {file.path for entry in self.entries.values() for file in entry.record.outputs}
