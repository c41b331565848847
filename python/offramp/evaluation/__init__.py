"""Measuring what exits cost and bring: agreement with the full model, speed, and the report of both."""
