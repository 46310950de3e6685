"""Show an app in the browser: look at clips, correct captions, start and watch runs, sample.

    pip install -r requirements-app.txt
    python training/app.py --root my-videos

It starts the commands that a shell would run, and shows them. Runs continue when the page or the app is closed.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from args import parse_app_args
from common.errors import UserError, one_line_errors
from common.startup import announce


def main(argv: Sequence[str] | None = None) -> None:
    """Run the app with the flags of `argv`, or of the command line if it is None, until Ctrl-C."""
    with one_line_errors("start the app again to see its runs"):
        settings = parse_app_args(argv)
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the app needs gradio, which is not installed: pip install -r requirements-app.txt")
        root = Path(settings.app.root).resolve()
        os.chdir(root)  # paths on the page and in commands start from there
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
        announce("loading gradio")
        from studio.server import serve

        serve(root, settings.app.host, settings.app.port)


if __name__ == "__main__":
    main()
