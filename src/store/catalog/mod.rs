//! The catalog: what people do with versions. Push, import, refs, log, diff, get, gc.

pub mod lakefmt;
pub mod refs;
