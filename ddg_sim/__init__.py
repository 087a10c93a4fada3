"""Timing of schedules: what a training method costs before anybody runs it."""
