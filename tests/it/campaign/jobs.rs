//! The golden trace again and again, with a scheduler that is killed at random moments.

use std::time::Duration;

use super::Campaign;
use crate::golden::Golden;

#[test]
#[ignore = "long: make campaign PART=jobs"]
fn a_scheduler_that_is_killed_at_random_moments_loses_nothing_and_starts_nothing_twice() {
    let mut campaign = Campaign::new();
    let mut kills = 0;
    for round in 0.. {
        if !campaign.goes_on(round, 1000) {
            break;
        }
        let mut golden = Golden::new();
        golden.play(&mut |gpus| {
            for _ in 0..campaign.below(3) {
                std::thread::sleep(Duration::from_millis(campaign.below(400)));
                gpus.kill();
                kills += 1;
                gpus.start();
            }
        });
        golden.assert_nothing_is_lost_or_twice();
    }
    println!("{kills} kills");
}
