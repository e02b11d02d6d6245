//! The node: mount table, control API, daemon.
