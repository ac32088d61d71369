"""A job from one recipe: its sections, a recipe to begin with, and going through the stages."""
