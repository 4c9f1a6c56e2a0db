"""Predictors: distributions over a call's work, learnt from what earlier calls came to."""
