//! Gathering a pack together with other nodes: claims, marks, the turn to publish.
//!
//! ```text
//! claim a span -> bring its pieces -> mark it -> the next one
//! nothing left to claim: wait for the marks of others, or take over what they let go
//! all marked: one node reads the pack back and publishes it, the others wait for the object
//! ```
//!
//! Claims save work, nothing else: two nodes that bring the same span write the same bytes, and two
//! that publish link the same ones.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep};

use super::engine::Inner;
use super::fill::FillState;
use super::job::PackFillError;
use super::lanes::Lane;
use super::packs::PackState;
use super::port::{FetchTier, SpanClaim};
use super::spans::SpanState;
use super::stats::bump;
use super::tier_port::is_overtaken;

/// Spans of one pack that a node brings at once: the next is claimed while the last pieces of one come.
const SPANS_AT_ONCE: usize = 2;
/// How often a node that waits for others looks: at first, and at the longest.
const LOOK_MIN: Duration = Duration::from_millis(50);
const LOOK_MAX: Duration = Duration::from_millis(500);

/// What waiting for other nodes led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Go on.
    Ours,
    /// Another node has published the pack.
    Published,
}

/// Waits longer each time.
#[derive(Debug)]
struct Looks(Duration);

impl Looks {
    fn new() -> Self {
        Self(LOOK_MIN)
    }

    async fn wait(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 3 / 2).min(LOOK_MAX);
    }
}

impl Inner {
    /// Brings the spans that no other node brings, and waits for the rest.
    pub(super) async fn gather(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
    ) -> Result<Turn, PackFillError> {
        let mut running = FuturesUnordered::new();
        let mut looks = Looks::new();
        loop {
            while running.len() < SPANS_AT_ONCE {
                let Some(span) = fill.spans.next(Instant::now()) else { break };
                running.push(self.bring_span(fill, span));
            }
            if let Some(result) = running.next().await {
                if result? {
                    looks = Looks::new();
                }
                continue;
            }
            if fill.spans.are_all_marked() {
                return Ok(Turn::Ours);
            }
            looks.wait().await;
            if self.look_around(tier, state, fill).await? == Turn::Published {
                return Ok(Turn::Published);
            }
        }
    }

    /// Brings a span if it is ours, or can be. False: it is another node's.
    async fn bring_span(self: &Arc<Self>, fill: &Arc<FillState>, span: u64) -> Result<bool, PackFillError> {
        if fill.spans.state(span) == SpanState::Asking {
            self.ask_for_span(fill, span, true).await?;
        }
        let SpanState::Mine { taken_over, .. } = fill.spans.state(span) else {
            return Ok(false);
        };
        let pieces = fill.pieces_of(span);
        if taken_over && !fill.is_exclusive() {
            self.take_what_is_there(fill, span).await;
        }
        // What another node took over meanwhile is its to bring.
        let is_mine = || matches!(fill.spans.state(span), SpanState::Mine { .. });
        while is_mine() && !fill.are_done(pieces.clone()) {
            self.bring_pieces(fill, fill.todo(pieces.clone()), is_mine).await?;
            self.until_landed(fill, pieces.clone()).await;
        }
        self.mark_if_complete(fill, span).await?;
        Ok(true)
    }

    /// Asks the tier for a span that is `Asking`.
    pub(super) async fn ask_for_span(
        self: &Arc<Self>,
        fill: &Arc<FillState>,
        span: u64,
        driven: bool,
    ) -> Result<(), PackFillError> {
        let (inner, asker) = (self.clone(), fill.clone());
        // What the answer means is noted there: whoever waits for it may leave.
        let ask = move || {
            let answer = asker.claim(span).inspect_err(|_| asker.spans.unanswered(span))?;
            match &answer {
                SpanClaim::Other { node, .. } => {
                    bump(&inner.counters.claims_other);
                    inner.fills.saw(*node);
                }
                SpanClaim::Mine { .. } => bump(&inner.counters.claims_won),
                SpanClaim::Done => {}
            }
            asker.spans.answered(span, answer, driven, Instant::now());
            asker.take_marks();
            Ok(())
        };
        self.on_tier(fill.pack, ask).await
    }

    /// Takes what the former owner of a span had written, piece by piece, where it is good.
    async fn take_what_is_there(self: &Arc<Self>, fill: &Arc<FillState>, span: u64) {
        for index in fill.todo(fill.pieces_of(span)) {
            let Some(piece) = fill.pieces.get(index).copied() else {
                continue;
            };
            let _permit = self.lanes.acquire(Lane::Prefetch, piece.len).await;
            let (inner, there) = (self.clone(), fill.clone());
            let look = move || {
                let mut bytes = vec![0; piece.len as usize];
                let read = there.read_staged(&mut bytes, piece.offset).is_ok();
                read && inner.is_good_piece(&there, &piece, &bytes)
            };
            if tokio::task::spawn_blocking(look).await.unwrap_or(false) {
                fill.set_done(index, true);
            }
        }
    }

    /// Learns what other nodes did since.
    async fn look_around(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
    ) -> Result<Turn, PackFillError> {
        let looker = fill.clone();
        let look = move || {
            looker.stage.refresh()?;
            looker.take_marks();
            Ok(())
        };
        match self.on_tier(fill.pack, look).await {
            Ok(()) => Ok(Turn::Ours),
            // The folder is gone: published, or given up. In that case the fill begins again.
            Err(error) => match self.is_published(tier, state).await {
                true => Ok(Turn::Published),
                false => Err(error),
            },
        }
    }

    /// Waits until it is this node's turn to publish, or another has.
    pub(super) async fn take_turn_to_publish(
        self: &Arc<Self>,
        tier: &Arc<dyn FetchTier>,
        state: &Arc<PackState>,
        fill: &Arc<FillState>,
    ) -> Result<Turn, PackFillError> {
        let mut looks = Looks::new();
        let mut ask_at = Instant::now();
        loop {
            if Instant::now() >= ask_at {
                let (asker, turn) = (fill.clone(), fill.spans.count());
                match self.on_tier(fill.pack, move || asker.claim(turn)).await {
                    Ok(SpanClaim::Other { left, .. }) => ask_at = Instant::now() + left.max(LOOK_MAX),
                    Ok(SpanClaim::Mine { .. } | SpanClaim::Done) => return Ok(Turn::Ours),
                    Err(error) => {
                        return match self.is_published(tier, state).await {
                            true => Ok(Turn::Published),
                            false => Err(error),
                        };
                    }
                }
            }
            looks.wait().await;
            if self.look_around(tier, state, fill).await? == Turn::Published {
                return Ok(Turn::Published);
            }
        }
    }

    /// Renews the claims of a fill as long as it runs.
    pub(super) async fn keep_claims(self: &Arc<Self>, fill: &Arc<FillState>) -> Infallible {
        let ttl = fill.stage.claim_ttl();
        loop {
            sleep(ttl / 4).await;
            let renewer = fill.clone();
            let renewed = tokio::task::spawn_blocking(move || renewer.stage.renew()).await;
            match renewed {
                Ok(Ok(lost)) => {
                    for span in lost {
                        bump(&self.counters.claims_lost);
                        tracing::info!(pack = %fill.pack, span, "another node took a span over");
                        fill.spans.lose(span, Instant::now() + ttl);
                    }
                }
                // Not renewed: another may take it over, which costs its bytes once more.
                Ok(Err(error)) if !is_overtaken(&error) => {
                    tracing::debug!(pack = %fill.pack, %error, "a claim could not be renewed");
                }
                _ => {}
            }
        }
    }
}
