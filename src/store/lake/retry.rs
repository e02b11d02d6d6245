//! Which lake errors pass, and how long to wait before the next try.
