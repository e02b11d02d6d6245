//! Integration tests: one binary, a module per area, a shared kit.

// Not every area uses every helper of the kit.
#![allow(dead_code)]

mod bounds;
mod cache;
mod campaign;
mod cli;
mod config;
mod containers;
mod csi;
mod csi_pods;
mod daemon;
mod format;
mod gc;
mod golden;
mod history;
mod import;
mod job_data;
mod jobs;
mod kit;
mod lake;
mod lake_away;
mod mount_keeper;
mod mount_kernel;
mod mount_rootless;
mod mount_trees;
mod nodes;
mod posix;
mod push;
mod safe;
mod scheduler;
mod service;
mod stored;
mod survive;
mod tier;
mod tiers;
mod together;
