//! The tier: a write-once cache of packs in a directory, shared by nodes without locks.
