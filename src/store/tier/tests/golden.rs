//! The tier's small files as version 1 wrote them.

use uuid::Uuid;

use crate::format::ids::{CommitId, LakeId, NodeId, PackId, PlacementId, TierId};
use crate::format::placement::PackUse;
use crate::store::tier::holds::HoldText;
use crate::store::tier::layout::CommitKey;
use crate::store::tier::marker::Marker;
use crate::store::tier::objects::{FileIdentity, QuarantineReport};
use crate::store::tier::records::{Note, Record, TtlText};
use crate::store::tier::room::RoomNote;
use crate::store::tier::siblings::Purpose;
use crate::store::tier::stage::Generation;
use crate::store::tier::stall::Suspicion;
use crate::store::tier::turns::Owner;
use crate::testkit::golden::assert_golden;

fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(n << 64 | n)
}

fn key() -> CommitKey {
    CommitKey { lake: LakeId(uuid(1)), commit: CommitId([2; 32]) }
}

#[test]
fn small_files_are_read_and_written_as_version_1_did() {
    let (format, node, time_ms) = (1, NodeId(uuid(3)), 1_700_000_000_000);
    let host = || "gpu7".to_owned();
    let marker = Marker {
        format,
        tier: TierId(uuid(4)),
        created_ms: time_ms,
        dir_mode: 0o770,
        file_mode: 0o660,
        uid: Some(1000),
        gid: Some(100),
        capacity_bytes: Some(20 << 40),
        ttl_ms: Some(86_400_000),
    };
    assert_golden("tier-marker", &marker);
    let bare = Marker { uid: None, gid: None, capacity_bytes: None, ttl_ms: None, ..marker };
    assert_golden("tier-marker-bare", &bare);
    assert_golden(
        "tier-generation",
        &Generation { format, generation: uuid(5), len_bytes: 300 << 20, span_len_bytes: 64 << 20 },
    );
    let owner = Owner { node, instance: uuid(6), address: Some("10.0.0.5:7071".into()), host: Some(host()) };
    assert_golden("tier-claim", &owner);
    let lease = Note { format, node, host: host(), time_ms, instance: Some(uuid(6)), purpose: Some(Purpose::Fill) };
    assert_golden("tier-lease", &lease);
    assert_golden("tier-use", &Note { format, node, host: host(), time_ms, instance: None, purpose: None });
    assert_golden("tier-ttl", &TtlText { format, ttl_ms: 86_400_000 });
    assert_golden("tier-hold", &HoldText { format, key: key() });
    let identity = FileIdentity { file_id: 77, size_bytes: 4096, mtime_ns: 1_700_000_000_123_456_789 };
    let why = "it is shorter than its index says".to_owned();
    assert_golden("tier-report", &QuarantineReport { format, pack: PackId([7; 32]), identity, why, node, time_ms });
    let staged = [PackId([7; 32])].into();
    assert_golden(
        "tier-room",
        &RoomNote { format, time_ms, taken_bytes: 5, staged, capacity_bytes: 100, high_bytes: 90 },
    );
    assert_golden("tier-suspicion", &Suspicion { format, sum_bytes: 1 << 40, deleted_bytes: 1 << 30 });
}

#[test]
fn a_record_is_read_and_written_as_version_1_did() {
    let golden = include_bytes!("../../../../tests/golden/small/v1/tier-record.json");
    let record = Record {
        key: key(),
        dataset: "photos".to_owned(),
        placement: PlacementId([8; 32]),
        packs: vec![PackUse { pack: PackId([7; 32]), len: 8192, referenced: 5000 }],
    };
    assert_eq!(record.encode(1_700_000_000_000), golden.trim_ascii_end());
    assert_eq!(Record::decode(golden).expect("version 1 is read"), record);
}
