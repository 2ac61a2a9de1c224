"""STAND-IN: see tests/stand_in/README.md."""
