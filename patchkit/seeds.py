"""Seeds of random numbers that users choose."""

MOST = 2**62
"""Above what generators take there is an error of torch's; this leaves room for what is added to a seed."""
