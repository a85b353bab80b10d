"""Faults that people reported of tools like this one: the smallest input of each, two relatives, the right value."""
