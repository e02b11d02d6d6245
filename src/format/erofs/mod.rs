//! EROFS images: names, modes, times, and where each file's bytes lie in the packs.
//!
//! ```text
//! | superblock | device slots | names: directories' blocks | inodes, indexes, short targets |
//! ```
//!
//! * [`disk`]: the structures, byte by byte. * [`map`]: how a file is cut into chunks, and what of it
//!   has to be copied. * `dirs`: the blocks of a directory. * [`writer`]: all of it, entry by entry.
//!
//! Invariants: an image is a pure function of what the writer is given; memory does not grow with the
//! number of files (only with directories that wait to be read, and files with several links); what cannot be expressed is an error, never another byte. Names that do not ascend
//! and counts that do not add up are refused, so that no tree can make an image that the kernel would
//! have to doubt. The bytes: `docs/formats/image.md`.

mod dirs;
pub mod disk;
pub mod map;
pub mod writer;

pub use map::Copied;
pub use writer::{Attributes, Device, Finished, Item, Section, Sink, Spec, What, WriteError, Writer};

/// Version of images that this larder writes. Another version has other ids, so an old image is built anew.
pub const IMAGE_FORMAT: u32 = 1;
/// What everything is counted in.
pub const BLOCK: u64 = 4096;

#[cfg(test)]
mod tests;
