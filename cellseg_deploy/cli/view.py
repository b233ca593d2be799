"""``cellseg-view``: look at a run in the browser, and correct it."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import click

from cellseg_deploy.cli import console

_EPILOG = """\b
cellseg-view counts/                  the folder of a run of cellseg-infer
cellseg-view smears/ -o mine/         images: each is counted when it is opened

\b
Exit codes: 0 ended (Ctrl-C), 2 usage, 4 no image found, 6 folder unusable or port taken, 7 another viewer corrects this
folder, 8 Starlette or Uvicorn not installed.
"""


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("path", metavar="OUT|IMAGES", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the corrections of IMAGES.  [default: NAME-view beside them]",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: any free one]")
@click.option("--no-browser", is_flag=True, help="Print the address only.")
@click.option(
    "--classes",
    metavar="A,B",
    help="Classes that cells can be given.  [default: those of the model, or red, white and platelet]",
)
@click.option(
    "--max-upload",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    metavar="MB",
    help="Largest image that may be dragged into the page.",
)
@console.log_options
def command(
    path: Path,
    output: Path | None,
    port: int,
    no_browser: bool,
    classes: str | None,
    max_upload: int,
    quiet: bool,
    verbose: int,
) -> None:
    """Look at the cells of a run, or of images, in the browser, and correct them.

    The page is served on this machine only, and needs the address that is printed. Corrections go to OUT/corrections as
    they are made; nothing else in OUT is changed.
    """
    console.set_up_logging(verbose)
    console.require_packages("view", "starlette", "uvicorn")
    from cellseg_deploy.view.app import make_app
    from cellseg_deploy.view.source import open_source
    from cellseg_deploy.view.workspace import Workspace
    from cellseg_deploy.web.server import ADDRESS, listening_socket, serve

    opened = open_source(path, output)
    with Workspace(opened, class_names=console.names_in(classes) or ()) as workspace, listening_socket(port) as bound:
        for notice in workspace.corrections.notices:
            console.say(f"warning: {console.printable(notice)}")
        token, port = secrets.token_urlsafe(24), bound.getsockname()[1]
        address = f"http://{ADDRESS}:{port}/?token={token}"

        def started() -> None:
            click.echo(address)
            sys.stdout.flush()
            if not quiet:
                console.say("Ctrl-C ends the viewer; corrections are saved as they are made")
            if not no_browser:
                import webbrowser

                webbrowser.open(address)

        try:
            serve(make_app(workspace, token=token, port=port, max_upload=max_upload << 20), bound, started)
        except KeyboardInterrupt:  # the usual end; Uvicorn has finished what it answered
            return


def main() -> None:
    """Entry point of the command."""
    sys.exit(console.run(command))
