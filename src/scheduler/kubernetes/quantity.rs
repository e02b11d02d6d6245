//! Quantities of resources as Kubernetes writes them (`500m`, `1.5`, `16Gi`, `1e3`), in thousandths and exact
//! as far as that goes: rounded up below.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Amounts by resource, in thousandths, sorted by name.
pub type Amounts = BTreeMap<String, i128>;

/// Reads a quantity; None where it is none.
pub fn milli(text: &str) -> Option<i128> {
    let text = text.trim();
    let at = text.find(|c: char| !(c.is_ascii_digit() || ".+-".contains(c))).unwrap_or(text.len());
    let (number, suffix) = text.split_at(at);
    let (times, over) = factor(suffix)?;
    let (whole, rest) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && rest.is_empty() {
        return None;
    }
    // What is behind the ninth decimal counts as none.
    let rest: String = format!("{rest:0<9}").chars().take(9).collect();
    let sign = if whole.starts_with('-') { -1 } else { 1 };
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let nano = whole.checked_mul(1_000_000_000)?.checked_add(sign * rest.parse::<i128>().ok()?)?;
    let scaled = nano.checked_mul(times)?;
    let below = over.checked_mul(1_000_000)?;
    let up = if scaled > 0 && scaled % below != 0 { 1 } else { 0 };
    Some(scaled / below + up)
}

/// What a suffix multiplies with, and divides by.
fn factor(suffix: &str) -> Option<(i128, i128)> {
    let binary = |power: u32| Some((1i128 << (10 * power), 1));
    match suffix {
        "" => Some((1, 1)),
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "k" => Some((1000, 1)),
        "M" => Some((1_000_000, 1)),
        "G" => Some((1_000_000_000, 1)),
        "T" => Some((1_000_000_000_000, 1)),
        "P" => Some((1_000_000_000_000_000, 1)),
        "E" => Some((1_000_000_000_000_000_000, 1)),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        _ => {
            let power: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let ten = 10i128.checked_pow(power.unsigned_abs())?;
            Some(if power < 0 { (1, ten) } else { (ten, 1) })
        }
    }
}

/// Reads a list of resources; what is no quantity is left out.
pub fn amounts(list: Option<&BTreeMap<String, Quantity>>) -> Amounts {
    let read = |(name, quantity): (&String, &Quantity)| Some((name.clone(), milli(&quantity.0)?));
    list.into_iter().flatten().filter_map(read).collect()
}

/// Adds to amounts.
pub fn add(to: &mut Amounts, what: &Amounts) {
    for (name, amount) in what {
        let sum = to.entry(name.clone()).or_default();
        *sum = sum.saturating_add(*amount);
    }
}

/// Takes from amounts.
pub fn subtract(from: &mut Amounts, what: &Amounts) {
    for (name, amount) in what {
        let rest = from.entry(name.clone()).or_default();
        *rest = rest.saturating_sub(*amount);
    }
}

/// Gives the first resource of which `asked` beside `used` is more than there is.
pub fn lacking<'a>(there: &Amounts, used: &Amounts, asked: &'a Amounts) -> Option<&'a str> {
    let of = |amounts: &Amounts, name: &str| amounts.get(name).copied().unwrap_or(0);
    let lacks = |name: &&String| of(asked, name) > 0 && of(asked, name) > of(there, name) - of(used, name);
    asked.keys().find(lacks).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_means_them() {
        let table = [
            ("1", 1000),
            ("500m", 500),
            ("0.5", 500),
            (".5", 500),
            ("1.5Gi", 1_610_612_736_000),
            ("16Gi", 17_179_869_184_000),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("12E-1", 1200),
            ("1E", 1_000_000_000_000_000_000_000),
            ("1n", 1),
            ("1500u", 2),
            ("0", 0),
            ("-1", -1000),
        ];
        for (text, wanted) in table {
            assert_eq!(milli(text), Some(wanted), "{text}");
        }
        for bad in ["", "x", "1x", "Gi", "1.2.3", "1e999", "--1"] {
            assert_eq!(milli(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_lacks_is_named() {
        let of = |pairs: &[(&str, i128)]| pairs.iter().map(|(name, amount)| ((*name).to_owned(), *amount)).collect();
        let (there, used): (Amounts, Amounts) = (of(&[("cpu", 4000), ("memory", 10)]), of(&[("cpu", 3000)]));
        assert_eq!(lacking(&there, &used, &of(&[("cpu", 1000), ("memory", 10)])), None);
        assert_eq!(lacking(&there, &used, &of(&[("cpu", 1001)])), Some("cpu"));
        assert_eq!(lacking(&there, &used, &of(&[("fpga", 1)])), Some("fpga"));
        assert_eq!(lacking(&there, &used, &of(&[("fpga", 0)])), None);
    }
}
