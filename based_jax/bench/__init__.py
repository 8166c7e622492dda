"""Times of single operations on the accelerator at hand, beside their floors and their peers."""
