"""PaddedMap."""
