//! Imports from a bucket of an S3 server, with the real binary.

use bytes::Bytes;
use larder::store::lake::{Lake, PutIf};

use crate::kit::s3::{BUCKET, TestS3};
use crate::kit::{World, runtime};

fn put(s3: &TestS3, keys: &[(&str, &str)]) {
    let data = s3.lake("userdata");
    runtime().block_on(async {
        for (key, body) in keys {
            data.put(key, Bytes::from((*body).to_owned()), PutIf::Always).await.expect("puts");
        }
    });
}

fn world(s3: &TestS3) -> World {
    let mut world = World::new();
    world.set_all(s3.env("lake"));
    world
}

#[test]
fn objects_are_imported_read_and_an_overwritten_one_fails_alone() {
    let s3 = TestS3::start();
    let world = world(&s3);
    put(&s3, &[("a", "bytes of a"), ("d/b", "bytes of b"), ("d/c", "bytes of c"), ("d/", ""), ("x/y", "1")]);
    let url = format!("s3://{BUCKET}/userdata");
    let made = world.json(&["import", &url, "photos", "-m", "first", "--tag", "v1"]);
    assert_eq!((made["files"].as_u64(), made["dirs"].as_u64()), (Some(4), Some(2)));
    assert_eq!(made["odd"][0]["key"], "userdata/d/");
    assert_eq!(world.ok(["ls", "-R", "photos@v1"]), "a\nd/\nx/\nd/b\nd/c\nx/y\n");
    assert_eq!(world.ok(["cat", "photos", "d/b"]), "bytes of b");
    assert!(world.ok(["show", "photos"]).contains("pinned, "));
    put(&s3, &[("d/b", "others' bytes")]);
    let out = world.path("out");
    let told = world.fails(1, ["get", "photos", out.to_str().unwrap()]);
    assert!(told.contains("d/b"), "{told}");
    assert_eq!(std::fs::read(out.join("d/c")).unwrap(), b"bytes of c");
    assert!(!out.join("d/b").exists());
    let again = world.json(&["import", &url, "photos"]);
    assert_eq!(again["unchanged"], false);
    assert_eq!(world.ok(["cat", "photos", "d/b"]), "others' bytes");
}

#[test]
fn a_digested_import_is_the_tree_that_a_push_makes_up_to_times_and_modes() {
    let s3 = TestS3::start();
    let world = world(&s3);
    put(&s3, &[("a", "bytes of a"), ("d/b", "bytes of b"), ("empty", "")]);
    world.ok(["import", &format!("s3://{BUCKET}/userdata/"), "photos", "--digest"]);
    let dir = world.files("src", &[("a", b"bytes of a"), ("d/b", b"bytes of b"), ("empty", b"")]);
    world.push(&dir, "pushed");
    let rows = world.json(&["diff", "photos", "pushed"]);
    for row in rows.as_array().unwrap() {
        assert_eq!(row["change"], "attributes", "{row}");
    }
    assert_eq!(world.json(&["show", "photos"])["proof"], "digested");
}

#[test]
fn a_prefix_without_objects_and_a_wrong_url_are_told_apart() {
    let s3 = TestS3::start();
    let world = world(&s3);
    let told = world.fails(1, ["import", &format!("s3://{BUCKET}/nothing"), "photos"]);
    assert!(told.contains("there is no object"), "{told}");
    world.fails(2, ["import", "http://x/y", "photos"]);
}
