"""Observers: what calibration data says about a layer's input, as (init, update, finalize) of pure functions."""
