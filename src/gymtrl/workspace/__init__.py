"""Artefact folders, settings and recipes: what ties the stages together."""
