//! The CSI driver as the kubelet sees it: volumes, errors, what a crash leaves.

use std::fs;
use std::path::PathBuf;

use larder::node::csi::proto::csi::volume_capability::access_mode::Mode;
use larder::node::csi::proto::csi::{
    CreateVolumeRequest, GetPluginInfoRequest, NodeGetInfoRequest, ProbeRequest, ValidateVolumeCapabilitiesRequest,
};
use larder::node::csi::proto::registration::registration_client::RegistrationClient;
use larder::node::csi::proto::registration::{InfoRequest, PluginInfo};
use serde_json::Value;
use tonic::Code;

use crate::kit::csi::{Csi, FakeApi, reading};
use crate::kit::proxy::Proxy;
use crate::kit::s3::{TestS3, env_at};
use crate::kit::{World, mount_by_kernel, runtime, wait_for};

/// A world with a dataset `xray`, its tag `v1`, and a daemon that runs.
fn world() -> World {
    let world = World::of_this_build();
    let source = world.files("one", &[("a/file", b"first"), ("b", b"other")]);
    world.push(&source, "xray");
    world.ok(["tag", "xray@main", "v1"]);
    world.ok(["daemon"]);
    world
}

/// Lists the directories where the daemon mounts.
fn mounts(world: &World) -> Vec<Value> {
    world.json(&["mounts"]).as_array().expect("a list").clone()
}

#[test]
fn pods_that_ask_for_the_same_share_one_mount_and_the_last_one_ends_it() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    let targets: Vec<PathBuf> = (0..3).map(|at| csi.pod(&format!("p{at}"))).collect();
    for (at, target) in targets.iter().enumerate() {
        // A tag and a branch that mean the same commit.
        let revision = if at == 0 { "xray@v1" } else { "xray" };
        csi.publish(&format!("v{at}"), target, &[("dataset", revision)]).expect("is published");
        assert_eq!(fs::read(target.join("a/file")).expect("reads"), b"first");
    }
    assert_eq!(mounts(&world).len(), 1);
    let below = csi.pod("below");
    csi.publish("below", &below, &[("dataset", "xray"), ("subdir", "a"), ("uid", "1000")]).expect("is published");
    assert_eq!(fs::read(below.join("file")).expect("reads"), b"first");
    assert_eq!(mounts(&world).len(), 2, "other options are another mount");
    let denied = fs::write(targets[0].join("new"), b"x").expect_err("is read-only");
    assert_eq!(denied.raw_os_error(), Some(nix::errno::Errno::EROFS as i32));

    csi.unpublish("below", &below).expect("is unpublished");
    assert_eq!(mounts(&world).len(), 1);
    for (at, target) in targets.iter().enumerate() {
        assert_eq!(fs::read(targets[2].join("b")).expect("the last one reads"), b"other");
        csi.unpublish(&format!("v{at}"), target).expect("is unpublished");
        csi.unpublish(&format!("v{at}"), target).expect("is so already");
        assert!(!target.exists(), "{}", target.display());
    }
    csi.nothing_is_left(&world);
}

#[test]
fn a_volume_keeps_the_commit_that_its_revision_was_when_it_was_first_published() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    let (old, new) = (csi.pod("old"), csi.pod("new"));
    csi.publish("v", &old, &[("dataset", "xray@main")]).expect("is published");
    let source = world.files("two", &[("a/file", b"second")]);
    world.push(&source, "xray");
    csi.kill();
    let csi = Csi::start(&world);
    // A kubelet that restarts publishes again; after a reboot nothing is mounted there any more.
    csi.publish("v", &old, &[("dataset", "xray@main")]).expect("is published");
    nix::mount::umount(&old).expect("unmounts");
    csi.publish("v", &old, &[("dataset", "xray@main")]).expect("is published again");
    csi.publish("v", &new, &[("dataset", "xray@main")]).expect("is published");
    assert_eq!(fs::read(old.join("a/file")).expect("reads"), b"first");
    assert_eq!(fs::read(new.join("a/file")).expect("reads"), b"second");
    let other = csi.publish("v", &old, &[("dataset", "xray@v1")]).expect_err("is another volume");
    assert_eq!(other.code(), Code::AlreadyExists, "{other}");
    assert_eq!(csi.unpublish("w", &old).expect_err("is another volume").code(), Code::NotFound);
    for target in [&old, &new] {
        csi.unpublish("v", target).expect("is unpublished");
    }
    csi.nothing_is_left(&world);
}

/// Where a driver dies on its way, by call.
const WHILE_PUBLISHING: [&str; 4] = ["recorded", "mounted", "target_made", "bound"];
const WHILE_UNPUBLISHING: [&str; 4] = ["unbound", "target_removed", "forgotten", "swept"];

/// Has a driver die at a moment of what it is asked.
fn die_at(world: &World, point: &str, ask: impl FnOnce(&Csi) -> Result<(), tonic::Status>) {
    let once = world.path("crashed");
    let _ = fs::remove_file(&once);
    let env = [("LARDER_CRASH_POINT", point), ("LARDER_CRASH_ONCE", once.to_str().expect("a plain path"))];
    let csi = Csi::start_with(world, &[], &env);
    ask(&csi).expect_err("it died");
    csi.wait_for_death();
    assert!(once.exists(), "{point} was never reached");
}

#[test]
fn a_driver_that_dies_while_it_publishes_leaves_nothing_that_is_not_mended() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let attributes = [("dataset", "xray@main")];
    for point in WHILE_PUBLISHING {
        // The kubelet publishes again; or it takes the pod away; or the node forgot the pod meanwhile.
        for what in ["again", "away", "gone"] {
            let publish = |csi: &Csi| csi.publish("v", &csi.pod("p"), &attributes);
            die_at(&world, point, publish);
            if what == "gone" {
                let pod = world.path("k/pods/p");
                // What was bound goes with the reboot.
                let _ = nix::mount::umount(&pod.join("volumes/kubernetes.io~csi/data/mount"));
                fs::remove_dir_all(pod).expect("removes the pod's folder");
            }
            let csi = Csi::start(&world);
            if what == "again" {
                publish(&csi).unwrap_or_else(|status| panic!("after {point}: {status}"));
                assert_eq!(fs::read(csi.pod("p").join("a/file")).expect("reads"), b"first", "after {point}");
                assert_eq!(mounts(&world).len(), 1, "after {point}");
            }
            if what != "gone" {
                csi.unpublish("v", &csi.pod("p")).unwrap_or_else(|status| panic!("after {point}: {status}"));
                assert!(!csi.pod("p").exists());
            }
            csi.nothing_is_left(&world);
        }
    }
}

#[test]
fn a_driver_that_dies_while_it_unpublishes_leaves_nothing_that_is_not_mended() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    for point in WHILE_UNPUBLISHING {
        for what in ["again", "start"] {
            let csi = Csi::start(&world);
            csi.publish("v", &csi.pod("p"), &[("dataset", "xray")]).expect("is published");
            csi.kill();
            die_at(&world, point, |csi| csi.unpublish("v", &csi.pod("p")));
            let csi = Csi::start(&world);
            // Behind these the target is no volume any more: the start alone has to clean up.
            if what == "again" || !["forgotten", "swept"].contains(&point) {
                csi.unpublish("v", &csi.pod("p")).unwrap_or_else(|status| panic!("after {point}: {status}"));
            }
            csi.nothing_is_left(&world);
            assert!(!csi.pod("p").exists());
        }
    }
}

#[test]
fn what_is_asked_wrongly_is_told_and_leaves_nothing() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    let target = csi.pod("p");
    type Attributes<'a> = &'a [(&'a str, &'a str)];
    let cases: [(Attributes<'_>, Code, &str); 6] = [
        (&[("dataset", "ct")], Code::NotFound, "ct"),
        (&[("dataset", "xray@v9")], Code::NotFound, "v9"),
        (&[("dataset", "xray"), ("subdir", "z")], Code::NotFound, "has no directory `z`"),
        (&[("dataset", "xray"), ("tier", "fast")], Code::InvalidArgument, "no tier `fast`"),
        (&[("datset", "xray")], Code::InvalidArgument, "`datset`"),
        (&[], Code::InvalidArgument, "dataset: NAME@REVISION"),
    ];
    for (attributes, code, said) in cases {
        let status = csi.publish("v", &target, attributes).expect_err(said);
        assert!(status.code() == code, "{attributes:?}: {status}");
        assert!(status.message().contains(said), "{attributes:?}: {status}");
        assert!(!target.exists(), "{attributes:?}");
    }
    let mut writer = Csi::request("v", &target, &[("dataset", "xray")]);
    writer.volume_capability = Some(reading(Mode::SingleNodeWriter));
    let status = csi.publish_as(writer.clone()).expect_err("would write");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("ReadOnlyMany"), "{status}");
    // The same for a volume of the pod's own manifest, which says that it only reads.
    writer.volume_context.insert("csi.storage.k8s.io/ephemeral".into(), "true".into());
    csi.publish_as(writer).expect("is published");
    csi.unpublish("v", &target).expect("is unpublished");
    csi.nothing_is_left(&world);
}

#[test]
fn policy_is_asked_about_the_pod_and_not_about_the_driver() {
    if !Csi::can_run() {
        return;
    }
    let mut world = World::of_this_build();
    let rules = "[[rule]]\nwho = [\"namespace:vision\", \"serviceaccount:training/nightly\"]\n\
                 datasets = [\"xray\"]\nrights = [\"mount\"]\n";
    fs::write(world.path("policy.toml"), rules).expect("writes");
    world.set("LARDER_POLICY", world.path("policy.toml").display().to_string());
    let source = world.files("one", &[("file", b"first")]);
    world.push(&source, "xray");
    world.ok(["daemon"]);
    let csi = Csi::start(&world);
    let ask = |namespace: &str, account: &str, more: &[(&str, &str)]| {
        let attributes = [
            ("dataset", "xray"),
            ("csi.storage.k8s.io/pod.namespace", namespace),
            ("csi.storage.k8s.io/serviceAccount.name", account),
        ];
        let target = csi.pod("p");
        let done = csi.publish("v", &target, &[attributes.as_slice(), more].concat());
        csi.unpublish("v", &target).expect("is unpublished");
        done
    };
    ask("vision", "default", &[]).expect("its namespace may");
    ask("training", "nightly", &[]).expect("its service account may");
    for (namespace, account) in [("training", "default"), ("", "")] {
        let status = ask(namespace, account, &[]).expect_err("may not");
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains("the policy of this node"), "{status}");
    }
    let kept = ask("vision", "default", &[("ttl", "3d")]).expect_err("may mount, and not say for how long");
    assert_eq!(kept.code(), Code::PermissionDenied, "{kept}");
    // The grants of the dataset count beside it.
    world.ok(["grant", "xray", "--to", "namespace:audio", "mount"]);
    assert_eq!(ask("vision", "default", &[]).expect_err("is not granted").code(), Code::PermissionDenied);
    world.ok(["grant", "xray", "--to", "namespace:vision", "mount"]);
    ask("vision", "default", &[]).expect("is granted");
    csi.nothing_is_left(&world);
}

#[test]
fn a_lake_that_is_away_is_told_and_nothing_hangs() {
    if !Csi::can_run() {
        return;
    }
    let s3 = TestS3::start();
    let proxy = Proxy::start(s3.addr());
    let mut world = World::of_this_build();
    world.set_all(env_at(&proxy.endpoint(), "away"));
    let source = world.files("one", &[("file", b"first")]);
    let commit = world.push(&source, "xray");
    world.set("LARDER_READ_TIMEOUT", "1s");
    world.set("LARDER_CONNECT_TIMEOUT", "1s");
    world.ok(["daemon"]);
    let csi = Csi::start_with(&world, &["--timeout", "50s"], &[]);
    let target = csi.pod("p");
    csi.publish("seen", &csi.pod("seen"), &[("dataset", &format!("xray@{commit}"))]).expect("is published");
    proxy.set_down(true);
    let status = csi.publish("v", &target, &[("dataset", "xray@main")]).expect_err("nobody knows what it is");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("the lake does not answer"), "{status}");
    // What is mounted is published at other targets all the same, by its commit.
    csi.publish("more", &csi.pod("more"), &[("dataset", &format!("xray@{commit}"))]).expect("is published");
    wait_for("the volume's condition", || {
        let stats = csi.stats("seen", &csi.pod("seen")).expect("answers");
        let condition = stats.volume_condition.expect("is told");
        condition.abnormal && condition.message.contains("the lake does not answer")
    });
    proxy.set_down(false);
    wait_for("the lake to be back", || csi.publish("v", &target, &[("dataset", "xray@main")]).is_ok());
    assert_eq!(fs::read(target.join("file")).expect("reads"), b"first");
}

#[test]
fn statistics_say_how_much_it_is_and_whether_the_pod_still_sees_it() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    let target = csi.pod("p");
    csi.publish("v", &target, &[("dataset", "xray")]).expect("is published");
    let stats = csi.stats("v", &target).expect("answers");
    let totals: Vec<i64> = stats.usage.iter().map(|usage| usage.total).collect();
    assert!(totals[0] == 10 && totals[1] >= 3, "bytes and entries: {totals:?}");
    assert!(stats.usage.iter().all(|usage| usage.available == 0 && usage.used == usage.total));
    assert!(!stats.volume_condition.expect("is told").abnormal);
    assert_eq!(csi.stats("w", &target).expect_err("another volume").code(), Code::NotFound);
    assert_eq!(csi.stats("v", &csi.pod("q")).expect_err("not published").code(), Code::NotFound);
    nix::mount::umount(&target).expect("unmounts");
    let condition = csi.stats("v", &target).expect("answers").volume_condition.expect("is told");
    assert!(condition.abnormal && condition.message.contains("nothing is mounted"), "{}", condition.message);
}

#[test]
fn the_kernel_engine_serves_volumes_when_the_commit_is_in_the_tier() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let source = world.files("probe", &[("file", b"probe")]);
    world.push(&source, "probe");
    world.ok(["cache", "probe"]);
    let Some(probe) = mount_by_kernel(&world, "probe", "probe-m", &[]) else {
        return;
    };
    world.ok(["umount", probe.to_str().expect("a plain path")]);
    let csi = Csi::start(&world);
    let (kernel, auto) = (csi.pod("kernel"), csi.pod("auto"));
    for (volume, target, engine) in [("k", &kernel, "kernel"), ("a", &auto, "auto")] {
        wait_for("the commit to be in the tier", || {
            match csi.publish(volume, target, &[("dataset", "xray"), ("engine", engine)]) {
                Ok(()) => true,
                Err(status) => {
                    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                    false
                }
            }
        });
        assert_eq!(fs::read(target.join("a/file")).expect("reads"), b"first");
    }
    let served = mounts(&world);
    assert_eq!(served.len(), 1, "{served:?}");
    assert_eq!(served[0]["engine"], "kernel");
    csi.unpublish("k", &kernel).expect("is unpublished");
    assert_eq!(fs::read(auto.join("b")).expect("reads"), b"other");
    csi.unpublish("a", &auto).expect("is unpublished");
    csi.nothing_is_left(&world);
}

#[test]
fn auto_takes_fuse_where_the_commit_is_not_in_the_tier_yet() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    let target = csi.pod("p");
    // `always` is never the kernel's.
    let attributes = [("dataset", "xray"), ("engine", "auto"), ("verify", "always")];
    csi.publish("v", &target, &attributes).expect("is published");
    assert_eq!(mounts(&world)[0]["engine"], "fuse");
    csi.publish("v", &target, &attributes).expect("is so already");
    csi.unpublish("v", &target).expect("is unpublished");
    csi.nothing_is_left(&world);
}

#[test]
fn the_driver_makes_itself_known_and_says_who_it_is() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let csi = Csi::start(&world);
    wait_for("the registration socket", || csi.registration_socket().exists());
    let channel = Csi::channel(&csi.registration_socket()).expect("connects");
    let asked = runtime().block_on(RegistrationClient::new(channel).get_info(InfoRequest {}));
    let PluginInfo { r#type, name, endpoint, supported_versions } = asked.expect("answers").into_inner();
    assert_eq!((r#type.as_str(), name.as_str()), ("CSIPlugin", "csi.larder.io"));
    assert_eq!(PathBuf::from(endpoint), csi.dir().join("csi.sock"));
    assert_eq!(supported_versions, ["1.0.0"]);
    let info = runtime().block_on(csi.identity().get_plugin_info(GetPluginInfoRequest {})).expect("answers");
    assert_eq!(info.into_inner().name, "csi.larder.io");
    let node = runtime().block_on(csi.node().node_get_info(NodeGetInfoRequest {})).expect("answers").into_inner();
    assert_eq!(node.node_id, "node-1");
    let ready = || runtime().block_on(csi.identity().probe(ProbeRequest {})).expect("answers").into_inner().ready;
    assert_eq!(ready(), Some(true));
    let kubelet = csi.kubelet().to_str().expect("a plain path").to_owned();
    world.ok(["csi", "--kubelet-dir", &kubelet, "probe", "--ready"]);
    world.ok(["daemon", "stop"]);
    assert_eq!(ready(), Some(false));
    world.ok(["csi", "probe", "--kubelet-dir", &kubelet]);
    let said = world.fails(1, ["csi", "probe", "--kubelet-dir", &kubelet, "--ready"]);
    assert!(said.contains("the daemon of the node does not answer"), "{said}");
    let status = csi.publish("v", &csi.pod("p"), &[("dataset", "xray")]).expect_err("nobody mounts");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(csi.pid()), nix::sys::signal::Signal::SIGTERM).expect("is told");
    let (registration, socket) = (csi.registration_socket(), csi.dir().join("csi.sock"));
    csi.wait_for_death();
    assert!(!registration.exists() && !socket.exists(), "a driver that ends leaves no socket");
}

#[test]
fn a_claim_is_a_function_of_its_name_and_its_class() {
    let world = World::of_this_build();
    let csi = Csi::start_with(&world, &["--mode", "all", "--no-register"], &[]);
    let create = |name: &str, parameters: &[(&str, &str)], mode: Mode| {
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            parameters: parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            volume_capabilities: vec![reading(mode)],
            ..CreateVolumeRequest::default()
        };
        let made = runtime().block_on(csi.controller().create_volume(request));
        made.map(|made| made.into_inner().volume.expect("a volume"))
    };
    let reader = Mode::MultiNodeReaderOnly;
    let class = [("dataset", "xray@v1"), ("csi.storage.k8s.io/pvc/name", "c")];
    let volume = create("pvc-1", &class, reader).expect("is made");
    assert_eq!(volume.volume_context.get("dataset").map(String::as_str), Some("xray@v1"));
    assert_eq!(volume.volume_context.len(), 1, "{:?}", volume.volume_context);
    assert_eq!(create("pvc-1", &class, reader).expect("is made again").volume_id, volume.volume_id);
    let other = create("pvc-1", &[("dataset", "ct")], reader).expect_err("is another volume");
    assert_eq!(other.code(), Code::AlreadyExists);
    let writer = create("pvc-2", &class, Mode::SingleNodeWriter).expect_err("would write");
    assert_eq!(writer.code(), Code::InvalidArgument);
    assert!(writer.message().contains("`accessModes: [ReadOnlyMany]` instead of ReadWriteOnce"), "{writer}");
    let validate = |id: &str| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: id.to_owned(),
            volume_capabilities: vec![reading(reader)],
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        runtime().block_on(csi.controller().validate_volume_capabilities(request))
    };
    assert!(validate(&volume.volume_id).expect("answers").into_inner().confirmed.is_some());
    assert_eq!(validate("vol-1").expect_err("is nobody's").code(), Code::NotFound);
}

#[test]
fn the_pods_events_say_which_commit_it_got_and_annotations_of_a_claim_are_read() {
    if !Csi::can_run() {
        return;
    }
    let world = world();
    let api = FakeApi::start(&[("csi.larder.io/dataset", "xray@v1"), ("other", "x")]);
    let kubeconfig = api.kubeconfig(&world);
    let csi = Csi::start_with(&world, &[], &[("KUBECONFIG", &kubeconfig)]);
    let claim = [("csi.storage.k8s.io/pvc/name", "claim"), ("csi.storage.k8s.io/pvc/namespace", "ns"), ("uid", "7")];
    let request = CreateVolumeRequest {
        name: "pvc-1".to_owned(),
        parameters: claim.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        volume_capabilities: vec![reading(Mode::MultiNodeReaderOnly)],
        ..CreateVolumeRequest::default()
    };
    let made = runtime().block_on(csi.controller().create_volume(request)).expect("is made");
    let volume = made.into_inner().volume.expect("a volume");
    let mut context: Vec<_> = volume.volume_context.into_iter().collect();
    context.sort();
    assert_eq!(context, [("dataset".into(), "xray@v1".into()), ("uid".into(), "7".into())]);

    let mut request = Csi::request(&volume.volume_id, &csi.pod("p"), &[]);
    request.volume_context = context.into_iter().collect();
    for (key, value) in [("pod.name", "train-0"), ("pod.namespace", "vision"), ("pod.uid", "u-1")] {
        request.volume_context.insert(format!("csi.storage.k8s.io/{key}"), value.to_owned());
    }
    csi.publish_as(request).expect("is published");
    wait_for("the event", || !api.events().is_empty());
    let (path, event) = api.events().remove(0);
    assert_eq!(path, "/apis/events.k8s.io/v1/namespaces/vision/events");
    assert_eq!(event["reason"], "LarderMounted");
    assert_eq!(event["regarding"]["uid"], "u-1");
    assert_eq!(
        (&event["reportingController"], &event["reportingInstance"]),
        (&"csi.larder.io".into(), &"node-1".into())
    );
    let commit = world.json(&["show", "xray@v1"])["commit"].as_str().expect("a commit").to_owned();
    let note = event["note"].as_str().expect("a note");
    assert!(note.contains(&format!("xray@v1 is commit {commit}")), "{note}");
    csi.unpublish(&volume.volume_id, &csi.pod("p")).expect("is unpublished");
    csi.nothing_is_left(&world);
}
