//! [`ServiceBuilderExt`]: a sentinel in a `tower::ServiceBuilder`.

use tower::ServiceBuilder;
use tower_layer::Stack;

use crate::sentinel::SentinelLayer;

/// Adds [`sentinel`](ServiceBuilderExt::sentinel) to [`tower::ServiceBuilder`].
pub trait ServiceBuilderExt<L> {
    /// Supervises each call; see [`SentinelLayer`].
    fn sentinel<P, H>(
        self,
        layer: SentinelLayer<P, H>,
    ) -> ServiceBuilder<Stack<SentinelLayer<P, H>, L>>;
}

impl<L> ServiceBuilderExt<L> for ServiceBuilder<L> {
    fn sentinel<P, H>(
        self,
        layer: SentinelLayer<P, H>,
    ) -> ServiceBuilder<Stack<SentinelLayer<P, H>, L>> {
        self.layer(layer)
    }
}
