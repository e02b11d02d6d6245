//! The one table from errors to errno.

use nix::errno::Errno;

use super::view::ViewError;

/// Says what a reader gets to see of an error.
pub(crate) fn errno_of(error: &ViewError) -> Errno {
    match error {
        ViewError::NoEntry => Errno::ENOENT,
        // The kernel asks only for numbers it was given, so this is a handle from elsewhere (an NFS
        // client, another commit).
        ViewError::NoInode => Errno::ESTALE,
        ViewError::NotDir => Errno::ENOTDIR,
        ViewError::NotFile => Errno::EISDIR,
        ViewError::NotLink => Errno::EINVAL,
        ViewError::NoXattr => Errno::ENODATA,
        ViewError::SmallBuffer => Errno::ERANGE,
        ViewError::ReadOnly => Errno::EROFS,
        ViewError::TooManyOpen => Errno::ENFILE,
        // Passing or not: a read gives the right bytes or EIO. What could pass was tried again
        // already, for as long as `fetch.give_up` allows.
        ViewError::Damaged(_) | ViewError::Meta(_) | ViewError::Fetch(_) => Errno::EIO,
    }
}

/// Says whether an error is an answer like any other, and not worth a line in the log.
pub(crate) fn is_ordinary(error: &ViewError) -> bool {
    errno_of(error) != Errno::EIO
}
