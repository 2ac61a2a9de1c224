"""STAND-IN: see tests/stand_in/README.md."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)[::-1]
