//! Rules of the protocol that are broken on purpose, one at a time: the simulation must find each, or its
//! silence about the real protocol says nothing.

use super::super::kit::new_world;
use super::baton::Counts;
use super::params::{Mending, Mix, Params};
use super::simulate;

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Bytes are marked, and published, without having been made durable.
    BytesNotSynced,
    /// Names are not made durable.
    NamesNotSynced,
    /// A span is marked before its bytes are written.
    MarkedBeforeWritten,
    /// What arrives is not checked.
    Unverified,
    /// Marks count for any data file of the pack.
    NoGenerations,
    /// Publishing copies instead of linking.
    PublishedByCopy,
    /// A staging file that is opened again is emptied.
    Truncated,
    /// Who mounts looks at the objects before its lease and record are there.
    LookedBeforeLease,
    /// Who evicts does not look at the leases again after it took the record.
    LeasesSeenOnce,
    /// Who evicts does not look at the records again after it moved an object.
    RecordsSeenOnce,
    /// Who evicts moves objects that other commits' records name.
    SharedObjectsMoved,
    /// Who evicts moves what others need, and the trash is emptied without a last look.
    TrashEmptiedBlindly,
    /// What was moved away and is needed is not put back.
    NotPutBack,
    /// What was taken over is not looked at once more.
    TakenOverUnseen,
    /// Ages are taken from the host's clock.
    HostsClock,
    /// A claim replaces another's.
    ClaimsReplace,
    /// What a client remembers of names is believed.
    NoRefresh,
    /// Who keeps does not look for the record again.
    RecordSeenOnceByKeep,
    /// A hold has links and no text that says whose.
    HoldUntold,
    /// An object is set aside by its name.
    SetAsideByName,
    /// Staging is given up under a live claim.
    LiveStagingGivenUp,
    /// A file with two names is counted twice.
    CountedTwice,
    /// Temporary files stay.
    NothingRemoved,
}

impl Broken {
    /// Worlds in which it can matter at all.
    fn arrange(self, params: &mut Params) {
        match self {
            Self::BytesNotSynced | Self::NamesNotSynced => {
                (params.power_cuts, params.crash_one_in) = (true, 300);
            }
            Self::SetAsideByName => {
                params.damage = true;
                params.crowd(Mix::Damage);
            }
            Self::NoGenerations => params.crowd(Mix::Filling),
            Self::LeasesSeenOnce
            | Self::RecordsSeenOnce
            | Self::TrashEmptiedBlindly
            | Self::RecordSeenOnceByKeep
            | Self::NotPutBack => {
                // Later sweeps mend what comes of it: that is another rule, and broken as well here.
                (params.brake, params.mending) = (true, Mending::None);
                params.crowd(Mix::Evicting);
            }
            Self::TakenOverUnseen => {
                params.brake = true;
                params.crowd(Mix::Evicting);
            }
            Self::NoRefresh => {
                // Much happens while a name is believed, and nobody sleeps until it no longer is.
                params.operation_ms_max = 5;
                params.crowd(Mix::Evicting);
                params.pause_one_in = 0;
            }
            Self::HoldUntold => params.crowd(Mix::Evicting),
            _ => {}
        }
    }
}

/// Seeds that are tried for each.
const SEEDS: u64 = 400;

/// The simulation reports that this promise is broken; gives the seed.
#[track_caller]
fn is_found(broken: Broken, promise: &str) {
    let base = new_world();
    let mut counts = Counts::default();
    let mut others = Vec::new();
    for seed in 1..=SEEDS {
        let mut params = Params::of(seed);
        params.broken = Some(broken);
        broken.arrange(&mut params);
        let outcome = simulate(&base, params, 1_500, false);
        counts.add(&outcome.counts);
        match outcome.violation {
            Some(violation) if violation.starts_with(promise) => {
                println!("{broken:?}: seed {seed}, after {} steps: {violation}", counts.steps);
                return;
            }
            Some(violation) => others.push(violation),
            None => {}
        }
    }
    panic!("{broken:?} was not found to break {promise} in {} steps; {others:?}", counts.steps);
}

macro_rules! rules {
    ($($(#[$mark:meta])* $name:ident: $broken:ident breaks $promise:literal;)*) => {
        $($(#[$mark])*
        #[test]
        fn $name() {
            is_found(Broken::$broken, $promise);
        })*
    };
}

rules! {
    bytes_that_are_not_synced_are_found: BytesNotSynced breaks "P2";
    names_that_are_not_synced_are_found: NamesNotSynced breaks "P5";
    a_mark_before_its_bytes_is_found: MarkedBeforeWritten breaks "P2";
    unverified_bytes_are_found: Unverified breaks "P2";
    marks_of_another_generation_are_found: NoGenerations breaks "P2";
    publishing_by_copy_is_found: PublishedByCopy breaks "P2";
    truncating_a_staging_file_is_found: Truncated breaks "P2";
    looking_before_the_lease_is_found: LookedBeforeLease breaks "P5";
    #[ignore = "found after a million steps: make campaign PART=sim"]
    evicting_without_a_second_look_at_leases_is_found: LeasesSeenOnce breaks "P5";
    #[ignore = "found after a million steps: make campaign PART=sim"]
    evicting_without_a_second_look_at_records_is_found: RecordsSeenOnce breaks "P5";
    moving_what_others_need_is_found: SharedObjectsMoved breaks "P5";
    #[ignore = "found after a million steps: make campaign PART=sim"]
    not_putting_back_is_found: NotPutBack breaks "P5";
    emptying_the_trash_blindly_is_found: TrashEmptiedBlindly breaks "P5";
    #[ignore = "found after half a million steps: make campaign PART=sim"]
    taking_over_without_a_second_look_is_found: TakenOverUnseen breaks "P5";
    ages_by_the_hosts_clock_are_found: HostsClock breaks "P";
    claims_that_replace_are_found: ClaimsReplace breaks "P4";
    believing_remembered_names_is_found: NoRefresh breaks "P5";
    #[ignore = "found after a million steps: make campaign PART=sim"]
    keeping_without_a_second_look_is_found: RecordSeenOnceByKeep breaks "P5";
    a_hold_that_says_nothing_is_found: HoldUntold breaks "P5";
    setting_aside_by_name_is_found: SetAsideByName breaks "P2";
    giving_up_live_staging_is_found: LiveStagingGivenUp breaks "P4";
    counting_twice_is_found: CountedTwice breaks "P8";
    leaving_temporary_files_is_found: NothingRemoved breaks "liveness";
}

/// What an eviction does is right by itself, and not only because later sweeps would mend it: else the rules
/// above would be found for another reason than theirs.
#[test]
#[ignore = "a million steps: make campaign PART=sim"]
fn evictions_that_keep_the_rules_need_no_mending() {
    let base = new_world();
    for seed in 1..=SEEDS {
        let mut params = Params::of(seed);
        (params.brake, params.mending) = (true, Mending::None);
        params.crowd(Mix::Evicting);
        let outcome = simulate(&base, params, 1_500, false);
        assert_eq!(outcome.violation, None, "seed {seed}");
    }
}

/// The last look before the trash is emptied is the third line of defence: where evictions move what others
/// need, and no sweep begins with putting it back, it alone keeps that from being lost.
#[test]
#[ignore = "a million steps: make campaign PART=sim"]
fn the_last_look_before_the_trash_is_emptied_keeps_what_the_others_missed() {
    let base = new_world();
    for seed in 1..=SEEDS {
        let mut params = Params::of(seed);
        params.broken = Some(Broken::TrashEmptiedBlindly);
        Broken::TrashEmptiedBlindly.arrange(&mut params);
        params.mending = Mending::LastLook;
        let outcome = simulate(&base, params, 1_500, false);
        assert_eq!(outcome.violation, None, "seed {seed}");
    }
}
