"""One operation a file: the plain-torch reference is the specification, faster forms stand beside it."""
