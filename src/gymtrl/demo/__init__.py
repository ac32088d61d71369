"""The whole job once, on one small machine."""
