//! Small files (JSON) as version 1 wrote them: what is in lakes and tiers must be read as it was meant, and be
//! written the same.

use std::fmt::Debug;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Compares a value with `tests/golden/small/v1/<name>.json`, both ways. A new one is written with
/// `LARDER_GOLDEN_WRITE=1`; one that was released is never changed.
#[track_caller]
pub(crate) fn assert_golden<T: Serialize + DeserializeOwned + Debug>(name: &str, value: &T) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/small/v1");
    let path = dir.join(format!("{name}.json"));
    let now = serde_json::to_value(value).expect("plain fields");
    if std::env::var_os("LARDER_GOLDEN_WRITE").is_some() && !path.exists() {
        std::fs::create_dir_all(&dir).expect("makes the folder");
        std::fs::write(&path, format!("{now}\n")).expect("writes it");
    }
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let golden: Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(now, golden, "{name}: what is written now is not what version 1 wrote");
    let read: T = serde_json::from_slice(&text).expect("version 1 is read");
    assert_eq!(format!("{read:?}"), format!("{value:?}"), "{name}: version 1 is read as something else");
}
