//! One of several leads: a Lease that is held, renewed and given back.
//!
//! Whoever holds it acts only until `give_up` behind the beginning of its last renewal, and no request lasts longer than
//! [`REQUEST_TIMEOUT`]; both together are less than the lease's duration, after which another one takes it. Of
//! others' renewals only the change counts, on the own clock: clocks of two machines are never compared.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;

use super::error::KubeError;
use super::requests::{REQUEST_TIMEOUT, Requests, Verb};

/// How long a lease is held, how often it is renewed, when a holder gives up.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub duration: Duration,
    pub renew: Duration,
    pub give_up: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let give_up = Duration::from_secs(8);
        debug_assert!(give_up + REQUEST_TIMEOUT < Duration::from_secs(15));
        Self { duration: Duration::from_secs(15), renew: Duration::from_secs(3), give_up }
    }
}

/// Whether this process leads. Without a lease it always does.
#[derive(Debug, Default)]
pub struct Leading {
    /// None: for ever.
    until: Mutex<Option<Option<Instant>>>,
}

impl Leading {
    /// Says whether something may be asked for now.
    pub fn now(&self) -> bool {
        match *self.lock() {
            None => false,
            Some(None) => true,
            Some(Some(until)) => Instant::now() < until,
        }
    }

    /// Leads from now on, for ever where there is no end.
    pub fn lead(&self, until: Option<Instant>) {
        *self.lock() = Some(until);
    }

    /// Leads no more.
    pub fn end(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Option<Instant>>> {
        self.until.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A lease of a name, for one process.
#[derive(Debug)]
pub struct Holder {
    pub api: Api<Lease>,
    pub name: String,
    pub identity: String,
    pub times: Times,
}

impl Holder {
    /// Waits until this process holds the lease.
    pub async fn acquire(&self, requests: &Requests, leading: &Leading) -> Lease {
        let mut seen: Option<(String, Instant)> = None;
        loop {
            let begun = Instant::now();
            match self.try_take(requests, &mut seen).await {
                Ok(Some(lease)) => {
                    leading.lead(Some(begun + self.times.give_up));
                    return lease;
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, lease = self.name, "the lease can't be asked for"),
            }
            tokio::time::sleep(self.times.renew / 2).await;
        }
    }

    async fn try_take(
        &self,
        requests: &Requests,
        seen: &mut Option<(String, Instant)>,
    ) -> Result<Option<Lease>, kube::Error> {
        let found = requests.send(Verb::Lease, self.api.get_opt(&self.name)).await?;
        let Some(mut lease) = found else {
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = self.held(Lease { metadata, ..Lease::default() }, 0);
            return self.settled(requests.send(Verb::Lease, self.api.create(&PostParams::default(), &lease)).await);
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let spec = lease.spec.take().unwrap_or_default();
        let is_free = spec.holder_identity.as_deref().unwrap_or("").is_empty();
        let since = match seen {
            Some((known, since)) if *known == version => *since,
            _ => seen.insert((version, Instant::now())).1,
        };
        if !is_free && since.elapsed() < self.times.duration {
            return Ok(None);
        }
        let lease = self.held(lease, spec.lease_transitions.unwrap_or(0).saturating_add(1));
        self.settled(requests.send(Verb::Lease, self.api.replace(&self.name, &PostParams::default(), &lease)).await)
    }

    /// Who was too late tries again.
    fn settled(&self, answer: Result<Lease, kube::Error>) -> Result<Option<Lease>, kube::Error> {
        match answer {
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(None),
            other => other.map(Some),
        }
    }

    fn held(&self, lease: Lease, transitions: i32) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let spec = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(i32::try_from(self.times.duration.as_secs()).unwrap_or(15).max(1)),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        Lease { spec: Some(spec), ..lease }
    }

    /// Renews the lease until that fails for too long, or somebody else has it.
    pub async fn keep(&self, mut lease: Lease, requests: &Requests, leading: &Leading) -> KubeError {
        let (mut last, params) = (Instant::now(), PostParams::default());
        loop {
            tokio::time::sleep_until((last + self.times.renew).into()).await;
            loop {
                let begun = Instant::now();
                if let Some(spec) = lease.spec.as_mut() {
                    spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
                }
                match requests.send(Verb::Lease, self.api.replace(&self.name, &params, &lease)).await {
                    Ok(renewed) => {
                        lease = renewed;
                        leading.lead(Some(begun + self.times.give_up));
                        last = begun;
                        break;
                    }
                    Err(error) => tracing::warn!(%error, lease = self.name, "the lease is not renewed"),
                }
                if !leading.now() || !self.is_still_ours(&mut lease, requests).await {
                    leading.end();
                    return KubeError::LeaseLost { name: self.name.clone() };
                }
                tokio::time::sleep(self.times.renew / 6).await;
            }
        }
    }

    /// Looks who has it: the answer to a renewal may have been lost. Where nobody answers, it counts as ours for its time.
    async fn is_still_ours(&self, lease: &mut Lease, requests: &Requests) -> bool {
        match requests.send(Verb::Lease, self.api.get_opt(&self.name)).await {
            Ok(Some(found)) => {
                let holder = found.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
                let ours = holder == Some(self.identity.as_str());
                if ours {
                    *lease = found;
                }
                ours
            }
            Ok(None) => false,
            Err(_) => true,
        }
    }

    /// Gives the lease back, so that nobody has to wait for its end.
    pub async fn release(&self, requests: &Requests) {
        let Ok(Some(mut lease)) = requests.send(Verb::Lease, self.api.get_opt(&self.name)).await else {
            return;
        };
        let Some(spec) = lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))
        else {
            return;
        };
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(jiff::Timestamp::now()));
        let params = PostParams::default();
        if let Err(error) = requests.send(Verb::Lease, self.api.replace(&self.name, &params, &lease)).await {
            tracing::info!(%error, "the lease is not given back; it ends by itself");
        }
    }
}
