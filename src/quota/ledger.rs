//! Which running jobs of a project stand within its quota, within its fair share, or on loan.
//!
//! A job's *level* is its rank among the project's jobs: jobs that can't be paused stand above all
//! others, then priority counts. Within a level the job that runs longest comes first.

use super::snapshot::MilliGpus;

/// Level of jobs that can't be paused.
pub(super) const FIRM: u64 = u64::MAX;

/// On which side of the two lines a running job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// Within the quota.
    Kept,
    /// Within the fair share.
    Fair,
    /// Beyond.
    Lent,
}

/// A running job of a project.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub job: u32,
    pub level: u64,
    pub started: u64,
    pub size: u64,
    pub standing: Standing,
}

/// How a project stands.
#[derive(Debug)]
pub(super) struct Account {
    pub quota: u64,
    pub weight: u64,
    pub limit: u64,
    pub fair_share: u64,
    pub demand: u64,
    /// GPUs of all running jobs.
    pub allocated: u64,
    /// Running jobs by level, greatest first, then by start.
    pub entries: Vec<Entry>,
    /// GPUs kept, and GPUs fair but not kept, by level, greatest first.
    sums: Vec<(u64, u64, u64)>,
}

impl Account {
    pub fn new(quota: MilliGpus, weight: u64, limit: Option<MilliGpus>) -> Self {
        Self {
            quota: quota.0,
            weight,
            limit: limit.map_or(u64::MAX, |limit| limit.0),
            fair_share: 0,
            demand: 0,
            allocated: 0,
            entries: Vec::new(),
            sums: Vec::new(),
        }
    }

    /// GPUs kept in all levels.
    pub fn kept(&self) -> u64 {
        self.sums.iter().map(|(_, kept, _)| kept).sum()
    }

    /// GPUs kept by jobs of at least that level.
    pub fn kept_from(&self, level: u64) -> u64 {
        self.sums.iter().take_while(|(at, _, _)| *at >= level).map(|(_, kept, _)| kept).sum()
    }

    fn fair_from(&self, level: u64) -> u64 {
        self.sums.iter().take_while(|(at, _, _)| *at >= level).map(|(_, _, fair)| fair).sum()
    }

    /// Says whether a job of that level and size is in quota.
    pub fn in_quota(&self, level: u64, size: u64) -> bool {
        self.kept_from(level).saturating_add(size) <= self.quota
    }

    /// Says whether a job of that level and size is in share.
    pub fn in_share(&self, level: u64, size: u64) -> bool {
        self.kept().saturating_add(self.fair_from(level)).saturating_add(size) <= self.fair_share
    }

    /// Says whether adding so much could push running jobs over a line.
    pub fn displaces(&self, size: u64) -> bool {
        self.kept().saturating_add(size) > self.quota
    }

    /// Says whether adding so much could push running jobs over the line of the fair share.
    pub fn displaces_fair(&self, size: u64) -> bool {
        self.kept().saturating_add(self.fair_from(0)).saturating_add(size) > self.fair_share
    }

    /// Adds a running job; `draw` the lines anew afterwards.
    pub fn insert(&mut self, job: u32, level: u64, started: u64, size: u64) {
        let at = self.entries.partition_point(|entry| {
            (std::cmp::Reverse(entry.level), entry.started) < (std::cmp::Reverse(level), started)
        });
        self.entries.insert(at, Entry { job, level, started, size, standing: Standing::Lent });
        self.allocated = self.allocated.saturating_add(size);
    }

    /// Lets the job just inserted stand within the quota, where it fits without displacing anybody.
    pub fn keep(&mut self, job: u32, level: u64, size: u64) {
        if let Some(entry) = self.entries.iter_mut().rev().find(|entry| entry.job == job) {
            entry.standing = Standing::Kept;
        }
        let at = self.sums.partition_point(|(other, _, _)| *other > level);
        match self.sums.get_mut(at).filter(|(other, _, _)| *other == level) {
            Some((_, kept, _)) => *kept += size,
            None => self.sums.insert(at, (level, size, 0)),
        }
    }

    /// Removes a running job; `draw` the lines anew afterwards.
    pub fn remove(&mut self, job: u32) {
        if let Some(at) = self.entries.iter().position(|entry| entry.job == job) {
            let entry = self.entries.remove(at);
            self.allocated = self.allocated.saturating_sub(entry.size);
        }
    }

    /// Draws both lines; calls `changed` for each job whose standing is another one now.
    pub fn draw(&mut self, mut changed: impl FnMut(u32, Standing)) {
        let mut kept_sum = 0u64;
        let mut kept = Vec::with_capacity(self.entries.len());
        for entry in &self.entries {
            // What can't be paused is kept in any case: a quota may have been lowered below it.
            let fits = entry.level == FIRM || kept_sum.saturating_add(entry.size) <= self.quota;
            kept_sum += if fits { entry.size } else { 0 };
            kept.push(fits);
        }
        let mut fair_sum = kept_sum;
        self.sums.clear();
        for (entry, kept) in self.entries.iter_mut().zip(kept) {
            let fits = !kept && fair_sum.saturating_add(entry.size) <= self.fair_share;
            fair_sum += if fits { entry.size } else { 0 };
            let standing = match (kept, fits) {
                (true, _) => Standing::Kept,
                (false, true) => Standing::Fair,
                (false, false) => Standing::Lent,
            };
            if standing != entry.standing {
                entry.standing = standing;
                changed(entry.job, standing);
            }
            if self.sums.last().is_none_or(|(level, _, _)| *level != entry.level) {
                self.sums.push((entry.level, 0, 0));
            }
            if let Some((_, kept_level, fair_level)) = self.sums.last_mut() {
                *kept_level += if kept { entry.size } else { 0 };
                *fair_level += if fits { entry.size } else { 0 };
            }
        }
    }

    /// Compares how far two projects are above their fair share, per weight, `minus` already taken from each.
    pub fn excess_cmp(&self, minus: u64, other: &Self, minus_other: u64) -> std::cmp::Ordering {
        let side = |account: &Self, minus: u64| {
            i128::from(account.allocated) - i128::from(minus) - i128::from(account.fair_share)
        };
        let left = side(self, minus) * i128::from(other.weight.max(1));
        let right = side(other, minus_other) * i128::from(self.weight.max(1));
        left.cmp(&right)
    }
}
