"""Faults that people reported of tools like this one: the smallest input of each, two relatives, and the right value."""
