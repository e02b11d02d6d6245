//! What a configuration is made of, in which order, and what is refused together.

use super::*;

fn env(vars: &[(&str, &str)]) -> Env {
    let mut all = BTreeMap::from([("HOME".to_owned(), "/home/ada".to_owned())]);
    all.extend(vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Env { vars: all, cwd: PathBuf::from("/cwd") }
}

fn load_text(text: &str, vars: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, Vec<String>> {
    let flags = flags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    merge(text, Path::new("/etc/l.toml"), &env(vars), &flags)
        .map_err(|error| error.problems().iter().map(ToString::to_string).collect())
}

#[test]
fn nothing_configured_is_the_laptop() {
    let loaded = load_text("", &[], &[]).expect("is valid");
    let config = &loaded.config;
    assert_eq!(config.state, Path::new("/home/ada/.local/state/larder"));
    assert_eq!(config.lake.url, "/home/ada/.local/share/larder/lake");
    let tier = config.tier.get("default").expect("a default tier");
    assert_eq!(tier.path, Path::new("/home/ada/.cache/larder/tier"));
    assert!(tier.auto_init);
    assert_eq!(config.daemon.socket, Path::new("/home/ada/.local/state/larder/daemon.sock"));
    assert!(!loaded.is_set("lake.url"));
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = "[fetch]\nrequests = 1\nmemory = \"1GiB\"\nstall_timeout = \"9s\"";
    let vars = [("LARDER_FETCH_MEMORY", "2GiB"), ("LARDER_FETCH_REQUESTS", "2")];
    let loaded = load_text(file, &vars, &[("fetch.requests", "3")]).expect("is valid");
    let fetch = &loaded.config.fetch;
    assert_eq!((fetch.requests, fetch.memory, fetch.stall_timeout.as_ms()), (3, Size(2 << 30), 9000));
    let origin = |key: &str| loaded.origins.get(key).map(ToString::to_string).unwrap_or_default();
    assert_eq!(origin("fetch.requests"), "--fetch-requests");
    assert_eq!(origin("fetch.memory"), "$LARDER_FETCH_MEMORY");
    assert_eq!(origin("fetch.stall_timeout"), "/etc/l.toml:4:17");
    assert_eq!(origin("fetch.give_up"), "default");
}

use super::super::types::Size;

#[test]
fn a_tier_from_the_environment_is_the_default_tier() {
    let loaded = load_text("", &[("LARDER_TIER", "/mnt/tier"), ("LARDER_TIER_TTL", "2d")], &[]).expect("is valid");
    let tier = loaded.config.tier.get("default").expect("a default tier");
    assert_eq!((tier.path.as_path(), tier.auto_init), (Path::new("/mnt/tier"), false));
    assert_eq!(tier.ttl.map(|ttl| ttl.as_ms()), Some(2 * 86_400_000));
}

#[test]
fn keys_of_one_tier_and_one_dataset_are_set_by_their_names() {
    let file = "[tier.fast]\npath = \"/mnt/fast\"\nttl = \"1d\"\n";
    let vars =
        [("LARDER_SET", "tier.fast.ttl=2d; tier.slow.path=slow ;dataset.xray.tier = slow"), ("LARDER_LAKE", "/l")];
    let flags = [("dataset.xray.ttl", "9d"), ("default_tier", "fast"), ("tier.slow.capacity", "1GiB")];
    let loaded = load_text(file, &vars, &flags).expect("is valid");
    let (fast, slow) = (&loaded.config.tier["fast"], &loaded.config.tier["slow"]);
    assert_eq!(fast.ttl.map(|ttl| ttl.as_ms()), Some(2 * 86_400_000));
    assert_eq!((slow.path.as_path(), slow.capacity), (Path::new("/cwd/slow"), Some(Size(1 << 30))));
    let xray = &loaded.config.dataset["xray"];
    assert_eq!((xray.tier.as_deref(), xray.ttl.map(|ttl| ttl.as_ms())), (Some("slow"), Some(9 * 86_400_000)));
    let origin = |key: &str| loaded.origins.get(key).map(ToString::to_string).unwrap_or_default();
    assert_eq!(origin("tier.fast.ttl"), "$LARDER_SET");
    assert_eq!(origin("dataset.xray.ttl"), "--set dataset.xray.ttl");
}

#[test]
fn what_is_set_by_name_is_checked_like_a_file() {
    let told = |vars: &[(&str, &str)]| load_text("", vars, &[]).expect_err("is wrong").join("\n");
    assert!(told(&[("LARDER_SET", "fetch.reqests=3")]).contains("did you mean `fetch.requests`"));
    assert!(told(&[("LARDER_SET", "tier.Fast.path=/x")]).contains("begins with a letter"));
    assert!(told(&[("LARDER_SET", "mount.verify")]).contains("is not KEY=VALUE"));
    assert!(told(&[("LARDER_SET", "dataset.x.ttl=long")]).starts_with("$LARDER_SET: dataset.x.ttl: "));
    let own = load_text("", &[("LARDER_SET", "fetch.requests=3"), ("LARDER_FETCH_REQUESTS", "4")], &[]);
    assert_eq!(own.expect("is valid").config.fetch.requests, 4);
}

#[test]
fn one_tier_in_the_file_is_the_default_and_the_environment_moves_it() {
    let file = "[tier.fast]\npath = \"/mnt/fast\"\n";
    let loaded = load_text(file, &[("LARDER_TIER", "/elsewhere")], &[]).expect("is valid");
    assert_eq!(loaded.config.default_tier.as_deref(), Some("fast"));
    assert_eq!(loaded.config.tier.get("fast").map(|t| t.path.clone()), Some(PathBuf::from("/elsewhere")));
    assert_eq!(loaded.config.tier.len(), 1);
}

#[test]
fn several_tiers_need_a_default() {
    let file = "[tier.a]\npath = \"/a\"\n[tier.b]\npath = \"/b\"\n";
    assert!(load_text(file, &[], &[]).expect_err("is wrong")[0].contains("default_tier"));
    assert!(load_text(&format!("default_tier = \"b\"\n{file}"), &[], &[]).is_ok());
    assert!(load_text(&format!("default_tier = \"c\"\n{file}"), &[], &[]).expect_err("is wrong")[0].contains("tier.c"));
}

#[test]
fn a_tier_without_a_directory_is_told_with_its_place() {
    let told = load_text("[tier.a]\nttl = \"1d\"\n", &[], &[]).expect_err("is wrong");
    assert_eq!(told, ["/etc/l.toml:2:7: tier.a.path: is missing: the tier's directory"]);
}

#[test]
fn relative_paths_are_taken_from_the_working_directory_but_not_in_a_file() {
    let loaded = load_text("", &[("LARDER_STATE", "st")], &[("lake.url", "lake")]).expect("is valid");
    assert_eq!(loaded.config.state, Path::new("/cwd/st"));
    assert_eq!(loaded.config.lake.url, "/cwd/lake");
    assert!(load_text("state = \"st\"", &[], &[]).is_err());
}

#[test]
fn a_long_state_directory_gets_a_short_socket() {
    let long = format!("/tmp/{}", "x".repeat(120));
    let loaded = load_text("", &[("LARDER_STATE", &long)], &[]).expect("is valid");
    assert!(loaded.config.daemon.socket.as_os_str().len() <= 100, "{:?}", loaded.config.daemon.socket);
    let again = load_text("", &[("LARDER_STATE", &long)], &[]).expect("is valid");
    assert_eq!(loaded.config.daemon.socket, again.config.daemon.socket);
}

#[test]
fn the_default_socket_lies_in_the_runtime_directory() {
    let loaded = load_text("", &[("XDG_RUNTIME_DIR", "/run/user/7")], &[]).expect("is valid");
    assert_eq!(loaded.config.daemon.socket, Path::new("/run/user/7/larder/daemon.sock"));
    let other = load_text("", &[("XDG_RUNTIME_DIR", "/run/user/7"), ("LARDER_STATE", "/s")], &[]).expect("is valid");
    assert_eq!(other.config.daemon.socket, Path::new("/s/daemon.sock"));
}

#[test]
fn without_a_home_the_next_step_is_told() {
    let bare = Env { vars: BTreeMap::new(), cwd: PathBuf::from("/") };
    let error = merge("", Path::new("-"), &bare, &Overrides::new()).expect_err("is wrong");
    let told: Vec<String> = error.problems().iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 3, "{told:#?}");
    assert!(told.iter().all(|line| line.contains("HOME")));
}

#[test]
fn what_does_not_fit_together_is_told_with_its_place() {
    let wrong = [
        ("[tier.a]\npath = \"/a\"\nhigh_watermark = 50\nlow_watermark = 60", "/etc/l.toml:4:17: tier.a.low_watermark"),
        ("[lake]\nurl = \"s3://bucket\"\nendpoint = \"host:1\"", "/etc/l.toml:3:12: lake.endpoint"),
        ("[lake]\nendpoint = \"http://h\"", "/etc/l.toml:2:12: lake.endpoint"),
        ("[lake]\nurl = \"s3://bucket\"\nsse = \"c\"", "/etc/l.toml:3:7: lake.sse"),
        ("[fetch]\nstall_timeout = \"1ms\"", "/etc/l.toml:2:17: fetch.stall_timeout"),
    ];
    for (text, start) in wrong {
        let told = load_text(text, &[], &[]).expect_err(text);
        assert!(told.iter().any(|line| line.starts_with(start)), "{text}: {told:#?}");
    }
}

#[test]
fn an_empty_variable_counts_as_unset() {
    assert!(load_text("", &[("LARDER_LAKE", "")], &[]).is_ok());
}

proptest::proptest! {
    #[test]
    fn any_text_is_a_configuration_or_a_list_of_problems(
        parts in proptest::collection::vec(proptest::sample::select(vec![
            "[", "]", "lake", "tier", ".", "a", "\n", "=", "\"", "s3://bucket", "1", "true", "{", "}", ",",
            "path", "/x", "\u{e9}", "requests", "fetch", "'", "#", " ", "ttl", "1d", "0x1F", "-", "dataset",
        ]), 0..40)
    ) {
        let text = parts.concat();
        if let Err(told) = load_text(&text, &[], &[]) {
            proptest::prop_assert!(!told.is_empty());
        }
    }
}
