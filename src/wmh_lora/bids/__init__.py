"""BIDS in and out: which scans a data set holds, and derivatives that others can read.

Discovery walks the layout of BIDS itself (``sub-*/[ses-*/]anat``): it opens no folder that cannot
hold a scan, and needs no library for BIDS.
"""
