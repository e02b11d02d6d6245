//! The formats that are JSON (commits, refs): one way to write them, one to read and refuse them.
//!
//! Fields are written in the order of the struct, without spaces. The version is looked at before
//! anything else, so that a newer object is refused as such and not for a field that it lacks.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec::{DecodeError, Problem};

#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

/// Encodes a value whose maps have text keys only, which cannot fail.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("a struct of texts, numbers and maps with text keys is JSON")
}

/// Decodes an object with a `format` field from 1 to `known`.
pub(crate) fn decode<T: DeserializeOwned>(
    object: &'static str,
    bytes: &[u8],
    known: u32,
    len_max: usize,
) -> Result<T, DecodeError> {
    let error = |offset, problem| DecodeError { object, offset, problem };
    if bytes.len() > len_max {
        return Err(error(len_max, Problem::Field { field: "length", why: "it is above the limit" }));
    }
    let syntax = |cause: serde_json::Error| {
        let problem = match cause.classify() {
            serde_json::error::Category::Eof => Problem::Truncated,
            serde_json::error::Category::Data => {
                Problem::Field { field: "JSON", why: "a field is missing or has another type" }
            }
            _ => Problem::Field { field: "JSON", why: "it does not parse" },
        };
        error(offset_of(bytes, cause.line(), cause.column()), problem)
    };
    let version: Version = serde_json::from_slice(bytes).map_err(syntax)?;
    match version.format {
        0 => Err(error(0, Problem::Field { field: "format", why: "it is zero" })),
        found if found > known => Err(error(0, Problem::Version { found, known })),
        _ => serde_json::from_slice(bytes).map_err(syntax),
    }
}

/// Turns a line and a column, both from 1, into an offset.
fn offset_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize = bytes.split_inclusive(|b| *b == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    before.saturating_add(column.saturating_sub(1)).min(bytes.len())
}
