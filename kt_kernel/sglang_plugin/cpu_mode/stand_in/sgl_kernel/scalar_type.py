"""Names of the number formats that SGLang's Marlin tables are keyed by.

SGLang only stores them in tables of supported formats when it is imported; no
attribute of a format exists here, so using one fails.
"""


class ScalarType:
    """A number format, known by its name only."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"ScalarType({self.name})"


class scalar_types:
    """The formats SGLang names at import."""

    uint4 = ScalarType("uint4")
    uint4b8 = ScalarType("uint4b8")
    uint8 = ScalarType("uint8")
    uint8b128 = ScalarType("uint8b128")
