"""Tests on devices that are not there.

`tests/test_ondevice.py` runs them in a process of their own, as one may by hand:

    PATCHKIT_TEST_DEVICE=fake pytest tests/ondevice
"""
