"""Imported first by every script: where packages are missing, one line says which command installs them."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("torch", "torchvision", "sklearn", "matplotlib", "numpy", "PIL", "tqdm")  # of requirements.txt
VENV = Path(__file__).resolve().parent.parent / ".venv"


def advice(script: str, missing: list[str], venv: Path) -> str:
    """The line for a script that was started with a Python that lacks packages."""
    problem = f"{script}: {', '.join(missing)} not installed for {sys.executable}"
    inside = Path(sys.executable).parent.parent.resolve() == venv  # sys.prefix needs site, which -S leaves out
    if (venv / "ready").exists() and not inside:
        return f"{problem}: run it with .venv/bin/python, or first: source .venv/bin/activate"
    return f"{problem}: run `make .venv/ready`, or: {sys.executable} -m pip install -r requirements.txt"


missing = [name for name in PACKAGES if find_spec(name) is None]
if missing:
    sys.exit(advice(Path(sys.argv[0]).name, missing, VENV))
