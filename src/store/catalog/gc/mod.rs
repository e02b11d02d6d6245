//! Garbage collection: condemn what nothing refers to, wait, look again, delete.
