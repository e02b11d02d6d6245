//! The mounted view of a commit.
pub mod keeper;
mod sys;
