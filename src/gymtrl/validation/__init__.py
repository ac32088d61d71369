"""Models tried in Gym: serve, collect, compare. Ties serving, Gym and the comparison together."""
