"""Folders of this repository, wherever a test stands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
"""Inputs and outputs of the published networks and operations."""
