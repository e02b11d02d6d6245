#![no_main]

use std::path::Path;

use larder::config::load::{Env, merge};

// Any text is a configuration or a list of problems, each with a place inside the text.
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let env = Env {
        vars: [("HOME".to_owned(), "/home/ada".to_owned())].into(),
        cwd: "/".into(),
    };
    if let Err(error) = merge(text, Path::new("/f.toml"), &env, &Default::default()) {
        assert!(!error.problems().is_empty());
    }
});
