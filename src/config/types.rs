//! Sizes, durations and percentages as they are written in a configuration.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes: `4GiB`, `500 MB`, `1048576`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

/// A span of time: `1d`, `90s`, `1h 30m`, `0s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span(pub Duration);

/// 1 to 100: `90` or `90%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(pub u8);

/// Says how the value should have looked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: {expected}")]
pub struct ValueError {
    pub kind: &'static str,
    pub text: String,
    pub expected: &'static str,
}

const SIZE_UNITS: [(&str, u64); 17] = [
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
    ("p", 1 << 50),
    ("pib", 1 << 50),
    ("pb", 1_000_000_000_000_000),
    ("", 1),
];

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let error = || ValueError {
            kind: "size",
            text: text.to_owned(),
            expected: "write a number of bytes or one with a unit, such as 512MiB, 4GiB or 2TB",
        };
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at_checked(digits).ok_or_else(error)?;
        let unit = unit.trim().to_ascii_lowercase();
        let scale = SIZE_UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale).ok_or_else(error)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let whole: u64 = whole.parse().map_err(|_| error())?;
        let mut bytes = whole.checked_mul(scale).ok_or_else(error)?;
        if number.contains('.') {
            // Up to nine digits behind the point, in integers: no rounding surprises.
            let digits = u32::try_from(fraction.len()).ok().filter(|n| (1..=9).contains(n)).ok_or_else(error)?;
            let part: u64 = fraction.parse().map_err(|_| error())?;
            let extra = u128::from(part) * u128::from(scale) / u128::from(10_u64.pow(digits));
            bytes = bytes.checked_add(u64::try_from(extra).map_err(|_| error())?).ok_or_else(error)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, scale) in [("TiB", 1_u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= scale && self.0.is_multiple_of(scale) {
                return write!(f, "{}{unit}", self.0 / scale);
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl FromStr for Span {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        humantime::parse_duration(text.trim()).map(Self).map_err(|_| ValueError {
            kind: "duration",
            text: text.to_owned(),
            expected: "write numbers with units, such as 30s, 15m, 12h, 1d or 1h 30m",
        })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_duration(self.0))
    }
}

impl Span {
    /// Gives whole milliseconds, at most `u64::MAX`.
    pub fn as_ms(&self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl FromStr for Percent {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let number = text.trim().trim_end_matches('%').trim_end();
        number.parse().ok().filter(|n| (1..=100).contains(n)).map(Self).ok_or_else(|| ValueError {
            kind: "percentage",
            text: text.to_owned(),
            expected: "write a whole number from 1 to 100",
        })
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

macro_rules! as_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[derive(Deserialize)]
                #[serde(untagged)]
                enum Raw {
                    Number(u64),
                    Text(String),
                }
                let text = match Raw::deserialize(deserializer)? {
                    Raw::Number(number) => number.to_string(),
                    Raw::Text(text) => text,
                };
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(Size);
as_text!(Span);
as_text!(Percent);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_and_without_units() {
        let good = [
            ("0", 0),
            ("1048576", 1 << 20),
            ("4GiB", 4 << 30),
            ("4g", 4 << 30),
            ("500 MB", 500_000_000),
            ("1.5KiB", 1536),
            ("0.5 b", 0),
        ];
        for (text, want) in good {
            assert_eq!(text.parse(), Ok(Size(want)), "{text}");
        }
        for text in ["", "GiB", "-1", "1..5", "1.", "4 gigs", "99999999999TiB", "1e6", "\u{ff11}"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_printed_parses_to_the_same() {
        for bytes in [0, 1, 1023, 1 << 10, 3 << 30, (1 << 40) + 1, u64::MAX] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
        for text in ["1d", "90s", "1h 30m", "0s"] {
            let span: Span = text.parse().expect(text);
            assert_eq!(span.to_string().parse(), Ok(span));
        }
    }

    #[test]
    fn percentages_are_1_to_100() {
        assert_eq!("90%".parse(), Ok(Percent(90)));
        for text in ["0", "101", "x", "", "-1", "9.5"] {
            assert!(text.parse::<Percent>().is_err(), "{text}");
        }
    }
}
