"""One file per architecture; importing this package imports none of them."""
