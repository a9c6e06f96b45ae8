"""Tests of the losses, their court, and their advantages."""
