//! How good the sharing is: 1,000 random traces, by fair shares, by strict quotas and by plain FIFO.

use super::Campaign;

#[path = "../../../benches/traces/mod.rs"]
mod traces;

#[test]
#[ignore = "long: make campaign PART=sched"]
fn sharing_uses_more_than_quotas_and_is_fairer_than_a_queue() {
    let mut campaign = Campaign::new();
    let ends = campaign.ends;
    let goes_on = |round: u64| round == 0 || (round < 1000 && std::time::Instant::now() < ends);
    let [fair, quota, fifo] = traces::compare(|limit| campaign.below(limit), goes_on);
    assert!(fair.used > quota.used, "lending uses more than strict quotas");
    assert!(fair.jain > fifo.jain, "shares are fairer than a queue");
}
