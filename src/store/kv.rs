//! The node's own small database.
