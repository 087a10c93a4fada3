"""The torch backend: schedules executed on tensors, in one process or in many."""
