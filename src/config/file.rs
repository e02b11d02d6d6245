//! A configuration file's text to checked values, each with its line and column.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{DATASET_KEYS, KEYS, Key, find};
use super::{Origin, Problem};

/// A checked value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Placed {
    pub value: toml::Value,
    pub origin: Origin,
}

/// Values by dotted name.
pub type Layer = BTreeMap<String, Placed>;

const NAME_RULE: &str = "a name is 1 to 63 of a-z 0-9 _ - and begins with a letter or digit";

/// Checks a whole file; gives its values, or everything that is wrong with it.
pub fn parse(text: &str, path: &Path) -> Result<Layer, Vec<Problem>> {
    let place = |at: usize| {
        let (line, column) = position(text, at);
        Origin::File { path: path.to_owned(), line, column }
    };
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        vec![Problem { origin: place(at), key: None, message: error.message().to_owned() }]
    })?;
    let mut found = Found { layer: Layer::new(), problems: Vec::new(), place: &place };
    walk(table.get_ref(), "", &mut found);
    // The parser's tables are in no order; people read from the top.
    found.problems.sort_by_key(|problem| match problem.origin {
        Origin::File { line, column, .. } => (line, column),
        _ => (0, 0),
    });
    if found.problems.is_empty() { Ok(found.layer) } else { Err(found.problems) }
}

struct Found<'a> {
    layer: Layer,
    problems: Vec<Problem>,
    place: &'a dyn Fn(usize) -> Origin,
}

impl Found<'_> {
    fn wrong(&mut self, at: usize, key: &str, message: String) {
        self.problems.push(Problem { origin: (self.place)(at), key: Some(key.to_owned()), message });
    }
}

fn walk(table: &DeTable<'_>, prefix: &str, found: &mut Found<'_>) {
    for (name, value) in table {
        let at = name.span().start;
        let name: &str = name.get_ref();
        let dotted = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        match (value.get_ref(), is_section(&dotted)) {
            (DeValue::Table(_), true) if !name_is_good(prefix, name) => {
                found.wrong(at, &dotted, NAME_RULE.into());
            }
            (DeValue::Table(below), true) => walk(below, &dotted, found),
            (_, true) => found.wrong(at, &dotted, "is a section: write [".to_owned() + &dotted + "]"),
            (_, false) => scalar(&dotted, at, value, found),
        }
    }
}

fn scalar(dotted: &str, at: usize, value: &Spanned<DeValue<'_>>, found: &mut Found<'_>) {
    let Some(key) = find(dotted) else {
        return found.wrong(at, dotted, unknown(dotted));
    };
    let start = value.span().start;
    let Some(text) = as_text(value.get_ref()) else {
        return found.wrong(start, dotted, format!("must be {}", key.kind.expected()));
    };
    match check_typed(key, value.get_ref(), &text) {
        Ok(value) => {
            let origin = (found.place)(start);
            found.layer.insert(dotted.to_owned(), Placed { value, origin });
        }
        Err(message) => found.wrong(start, dotted, message),
    }
}

fn unknown(dotted: &str) -> String {
    match nearest(dotted) {
        Some(near) => format!("unknown key; did you mean `{near}`?"),
        None => "unknown key; `larder config schema` lists all".to_owned(),
    }
}

/// Finds the key of a dotted name that stands in no file.
pub(super) fn check_name(dotted: &str) -> Result<&'static Key, String> {
    let key = find(dotted).ok_or_else(|| unknown(dotted))?;
    match dotted.split('.').collect::<Vec<_>>().as_slice() {
        // `*` is the default tier, in the table's own names.
        [section, name, _] if key.name != dotted && !name_is_good(section, name) => Err(NAME_RULE.to_owned()),
        _ => Ok(key),
    }
}

/// Checks a value of a file, where types count: `true` is no text and `"true"` no truth value.
fn check_typed(key: &Key, value: &DeValue<'_>, text: &str) -> Result<toml::Value, String> {
    use super::Kind;
    let fits = match key.kind {
        Kind::Bool => matches!(value, DeValue::Boolean(_)),
        Kind::Count { .. } => matches!(value, DeValue::Integer(_)),
        Kind::Size | Kind::Percent => matches!(value, DeValue::String(_) | DeValue::Integer(_)),
        Kind::Text | Kind::Path | Kind::Lake | Kind::Duration | Kind::Choice(_) => {
            matches!(value, DeValue::String(_))
        }
    };
    if !fits {
        return Err(format!("must be {}", key.kind.expected()));
    }
    key.kind.check(text)
}

fn as_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    }
}

fn is_section(dotted: &str) -> bool {
    let parts: Vec<&str> = dotted.split('.').collect();
    matches!(parts.as_slice(), ["lake" | "fetch" | "mount" | "daemon" | "tier" | "dataset"] | ["tier" | "dataset", _])
}

fn name_is_good(section: &str, name: &str) -> bool {
    if section != "tier" && section != "dataset" {
        return true;
    }
    let first = name.bytes().next();
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    // A dot would be taken for the next level of a dotted key.
    name.len() <= 63 && first.is_some_and(plain) && name.bytes().all(|b| plain(b) || b == b'-' || b == b'_')
}

/// Finds the key that is most like an unknown one, if any is like it at all.
fn nearest(dotted: &str) -> Option<String> {
    let names = KEYS.iter().chain(DATASET_KEYS).map(|key| key.name);
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let wanted = last(dotted);
    let best = names.map(|name| (distance(&wanted, &last(name)), name)).min()?;
    (best.0 <= 2 || last(best.1).starts_with(&wanted) && wanted.len() >= 3).then(|| best.1.to_owned())
}

/// Counts the edits between two short words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((cb, pair), left) in b.iter().zip(row.windows(2)).zip(0..) {
            let [diagonal, above] = pair else { continue };
            let beside = next.get(left).copied().unwrap_or(usize::MAX - 1);
            next.push((diagonal + usize::from(ca != *cb)).min(above + 1).min(beside + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

/// Gives line and column (in characters, from 1) of a byte offset.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    (line, column)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse(text, Path::new("/x.toml")).expect_err("is wrong").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn values_know_their_line_and_column() {
        let layer = parse("[lake]\nurl = \"s3://bucket/p\"\n", Path::new("/x.toml")).expect("is right");
        let origin = layer.get("lake.url").map(|placed| placed.origin.to_string());
        assert_eq!(origin.as_deref(), Some("/x.toml:2:7"));
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_once() {
        let told = problems("stat = \"/x\"\n[fetch]\nrequests = 0\nmemory = \"lots\"\n");
        assert_eq!(told.len(), 3, "{told:#?}");
        assert!(told[0].starts_with("/x.toml:1:1: stat: unknown key; did you mean `state`?"), "{told:#?}");
        assert!(told[1].starts_with("/x.toml:4:10: ") || told[2].starts_with("/x.toml:4:10: "), "{told:#?}");
    }

    #[test]
    fn a_broken_file_says_where_it_breaks() {
        let told = problems("[lake\n");
        assert!(told[0].starts_with("/x.toml:1:6: "), "{told:?}");
    }

    #[test]
    fn a_section_is_no_value_and_a_value_no_section() {
        assert!(problems("lake = \"s3://b\"")[0].contains("is a section"));
        assert!(problems("[state]\nx = 1")[0].contains("absolute path"));
    }

    #[test]
    fn words_a_letter_apart_are_near() {
        assert_eq!(distance("requets", "requests"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("same", "same"), 0);
    }
}
