//! [`ServiceBuilderExt`]: a sentinel in a `tower::ServiceBuilder`.

use tower::ServiceBuilder;
use tower_layer::Stack;

use crate::sentinel::SentinelLayer;

/// Extension of [`tower::ServiceBuilder`] with [`sentinel`](ServiceBuilderExt::sentinel).
pub trait ServiceBuilderExt<L> {
    /// Adds a [`SentinelLayer`], which supervises each call.
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
